"""Settings: typed, checked at start, one clear sentence for a bad one."""

from pathlib import Path

import pytest

from config import SettingError, Settings, ignored_variables


def read(**variables: str) -> Settings:
    return Settings.from_env({f"LANYARD_{name}": value for name, value in variables.items()})


def test_defaults_serve_this_machine_and_keep_the_management_api_shut() -> None:
    settings = read()
    assert (settings.host, settings.port, settings.local) == ("127.0.0.1", 8080, False)
    assert (settings.issuer, settings.audience) == ("http://localhost:8080", "http://localhost:8080")
    assert (settings.access_token_ttl, settings.refresh_token_ttl) == (3600, 7 * 86_400)
    assert (settings.signing_alg, settings.bcrypt_cost, settings.trusted_proxies) == ("RS256", 10, 0)


def test_every_setting_is_read(tmp_path: Path) -> None:
    settings = read(
        INSTANCE=str(tmp_path),
        DATABASE_URL=f"sqlite:///{tmp_path}/other.db",
        HOST="0.0.0.0",  # noqa: S104 - nothing listens
        PORT="9000",
        ADMIN_TOKEN="sixteen-chars-ok",
        ISSUER="https://id.example.com/lanyard",
        AUDIENCE="my-api",
        ACCESS_TOKEN_TTL="60",
        REFRESH_TOKEN_TTL="120",
        SIGNING_ALG="ES256",
        BCRYPT_COST="12",
        WORKERS="3",
        TRUSTED_PROXIES="1",
        EVENT_RETENTION_DAYS="30",
        CORS_ORIGINS="https://app.example.com, http://localhost:3000",
        ACCESS_LOG="1",
    )
    assert settings.database_file == tmp_path / "other.db"
    assert (settings.instance, settings.host, settings.port) == (tmp_path, "0.0.0.0", 9000)  # noqa: S104
    assert settings.admin_token == "sixteen-chars-ok"
    assert (settings.issuer, settings.audience) == ("https://id.example.com/lanyard", "my-api")
    assert settings.event_retention_days == 30
    assert settings.cors_origins == ("https://app.example.com", "http://localhost:3000")
    assert settings.access_log
    assert (settings.access_token_ttl, settings.refresh_token_ttl, settings.signing_alg) == (60, 120, "ES256")
    assert (settings.bcrypt_cost, settings.workers, settings.trusted_proxies) == (12, 3, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "٨٠٨٠"),
        ("LOCAL", "yes"),
        ("HOST", "not a host"),
        ("ADMIN_TOKEN", "short"),
        ("ADMIN_TOKEN", "sixteen chars and spaces"),
        ("ADMIN_TOKEN", 'sixteen=chars,or"more'),
        ("ISSUER", "id.example.com"),
        ("ISSUER", "http://id.example.com"),
        ("ISSUER", "https://id.example.com/?tenant=1"),
        ("ISSUER", "https://id.example.com/#top"),
        ("ISSUER", "https://user:pw@id.example.com"),
        ("ISSUER", "https://[id.example.com"),
        ("ISSUER", "https://id.example.com/<x>"),
        ("ISSUER", "https://id.example.com/a%20b"),
        ("AUDIENCE", "two words"),
        ("ACCESS_TOKEN_TTL", "0"),
        ("ACCESS_TOKEN_TTL", "86401"),
        ("REFRESH_TOKEN_TTL", "-1"),
        ("SIGNING_ALG", "HS256"),
        ("BCRYPT_COST", "3"),
        ("WORKERS", "1.5"),
        ("TRUSTED_PROXIES", "many"),
        ("DATABASE_URL", "postgresql://localhost"),
        ("DATABASE_URL", "postgresql+psycopg://localhost:5432x/lanyard"),
        ("DATABASE_URL", "mysql://localhost/lanyard"),
        ("DATABASE_URL", "postgresql+psycopg://lanyard:1/hunter2@localhost/lanyard"),
        ("DATABASE_URL", "postgresql+psycopg://lanyard:an@hunter2@localhost/lanyard"),
        ("DATABASE_URL", "postgresql+psycopg://localhost/lanyard?prepare_threshold=0"),
        ("DATABASE_URL", "sqlite:///relative.db"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("ACCESS_LOG", "/var/log/lanyard"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "app.example.com"),
        ("CORS_ORIGINS", "https://*.example.com"),
        ("CORS_ORIGINS", "https://app.example.com/"),
        ("CORS_ORIGINS", "https://App.example.com"),
        ("CORS_ORIGINS", "https://app.example.com:443"),
        ("CORS_ORIGINS", "https://app.example.com:0"),
        ("CORS_ORIGINS", "https://app.example.com:8a"),
        ("CORS_ORIGINS", "https://me:pw@app.example.com"),
        ("CORS_ORIGINS", "http://app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com,https://two.example.com?"),
        ("CORS_ORIGINS", "https://one.example.com https://two.example.com"),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        read(**{name: value})
    assert f"LANYARD_{name} must" in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "postgresql", "postgres"])
def test_postgresql_may_be_spelt_as_others_spell_it(scheme: str) -> None:
    settings = read(DATABASE_URL=f"{scheme}://me:hunter2@db.example:5433/lanyard?sslmode=require")
    assert settings.database_url.startswith("postgresql+psycopg://me:")
    assert (settings.uses_sqlite, settings.database_name) == (False, "postgresql://db.example:5433/lanyard")
    assert "hunter2" not in repr(settings)


def test_without_its_driver_postgresql_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("config.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"requirements-postgresql\.txt"):
        read(DATABASE_URL="postgresql://localhost/lanyard")


def test_a_bad_admin_token_is_not_repeated() -> None:
    with pytest.raises(SettingError) as caught:
        read(ADMIN_TOKEN="hunter2")
    assert "hunter2" not in str(caught.value)


def test_the_admin_token_is_not_in_the_settings_repr() -> None:
    assert "sixteen-chars-ok" not in repr(read(ADMIN_TOKEN="sixteen-chars-ok"))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::1", "localhost"])  # noqa: S104
def test_local_mode_refuses_any_host_but_127_0_0_1(host: str) -> None:
    with pytest.raises(SettingError, match=r"LANYARD_HOST must be 127\.0\.0\.1"):
        read(LOCAL="1", HOST=host)


def test_local_mode_trusts_no_proxy() -> None:
    with pytest.raises(SettingError, match="LANYARD_TRUSTED_PROXIES must be 0"):
        read(LOCAL="1", TRUSTED_PROXIES="1")


def test_local_mode_lets_no_other_site_in() -> None:
    with pytest.raises(SettingError, match="LANYARD_CORS_ORIGINS must not be set while LANYARD_LOCAL=1"):
        read(LOCAL="1", CORS_ORIGINS="http://localhost:3000")


@pytest.mark.parametrize("origin", ["https://a.example:8443", "http://[::1]:3000", "http://127.0.0.1"])
def test_origins_are_taken_as_browsers_send_them(origin: str) -> None:
    assert read(CORS_ORIGINS=origin).cors_origins == (origin,)


def test_no_origin_is_let_in_and_no_request_logged_unless_asked_for() -> None:
    assert (read().cors_origins, read().access_log) == ((), False)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read(PORT="", ISSUER=" ").port == 8080


def test_misspelt_settings_are_found() -> None:
    (sentence,) = ignored_variables({"LANYARD_PROT": "80", "LANYARD_PORT": "80", "HOME": "/"})
    assert "LANYARD_PROT" in sentence


def test_what_kubernetes_sets_for_a_service_counts_as_unset() -> None:
    pod = {
        "SERVICE_HOST": "10.96.0.7",
        "SERVICE_PORT": "8080",
        "SERVICE_PORT_HTTP": "8080",
        "PORT": "tcp://10.96.0.7:8080",
        "PORT_8080_TCP": "tcp://10.96.0.7:8080",
        "PORT_8080_TCP_PROTO": "tcp",
        "ISSUER": "https://id.example.com",
    }
    assert (read(**pod).port, read(**pod).issuer) == (8080, "https://id.example.com")
    (sentence,) = ignored_variables({f"LANYARD_{name}": value for name, value in pod.items()})
    assert "LANYARD_PORT " in sentence
