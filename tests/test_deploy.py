"""What is in `deploy/` does what it says: the real tools read it, and nginx runs with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import yaml
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from support.callers import OPERATOR
from support.instances import environment_of
from support.programs import DEPLOY, needs, nginx, through_nginx
from support.servers import Server, as_user, free_port, instead, token_body

from config import HERE, Settings

EXPOSURE = 1.5  # of 10; systemd calls anything below 2 OK


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana-dashboard.json").read_text()))


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def test_every_metric_of_the_dashboard_exists(client: FlaskClient) -> None:
    client.get("/health")
    # A key that waits, so that its moment is shown.
    client.post("/api/keys/rotate", json={}, headers=OPERATOR)
    text = client.get("/metrics", headers=OPERATOR).text
    there = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked = {name for expression in expressions() for name in re.findall(r"lanyard_\w+", expression)}
    assert asked - there == set()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert families - shown == set(), "not on the dashboard"


def test_the_dashboard_loads_on_any_prometheus() -> None:
    board = dashboard()
    panels = board["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert all({"text", "value"} <= set(variable["current"]) for variable in variables.values())
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used <= {*variables, "__rate_interval", "__all"}
    for panel in panels:
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert {source["uid"] for source in sources} == {"${datasource}"}


def test_no_panel_lies_on_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


@needs("promtool", "prometheus")
def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    file = tmp_path / "rules.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    told = subprocess.run(["promtool", "check", "rules", file], text=True, capture_output=True)
    assert told.returncode == 0, told.stdout + told.stderr


@needs("promtool", "prometheus")
def test_prometheus_takes_the_scrape_configuration(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-operators-token")
    file = tmp_path / "prometheus.yml"
    shipped = (DEPLOY / "prometheus.yml").read_text()
    file.write_text(shipped.replace("/etc/prometheus/lanyard_token", str(token)))
    assert str(token) in file.read_text()
    told = subprocess.run(["promtool", "check", "config", file], text=True, capture_output=True)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit file, with a program that is there."""
    file = tmp_path / "lanyard.service"
    text = (DEPLOY / "lanyard.service").read_text()
    changed = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
    assert changed != text
    file.write_text(changed)
    return file


@needs("systemd-analyze", "systemd")
def test_systemd_understands_the_unit(unit: Path) -> None:
    told = subprocess.run(["systemd-analyze", "verify", unit], text=True, capture_output=True)
    assert (told.returncode, told.stderr) == (0, "")


@needs("systemd-analyze", "systemd")
def test_the_unit_is_fenced_in(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={int(EXPOSURE * 10)}", unit]
    told = subprocess.run(command, text=True, capture_output=True)
    if "offline" in told.stderr:
        pytest.skip("this systemd-analyze knows no --offline: it came with systemd 250")
    assert told.returncode == 0, told.stdout + told.stderr


def container() -> list[list[str]]:
    """The steps of the Containerfile, each with what it says."""
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def copied_files() -> list[Path]:
    """What the container copies."""
    sources = [source for step, rest in container() if step == "COPY" for source in rest.split()[:-1]]
    return [path for source in sources for path in HERE.glob(source)]


def test_the_container_copies_existing_files_and_is_not_root() -> None:
    steps = container()
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK"}
    assert {step for step, _ in steps} <= known | {"STOPSIGNAL", "CMD"}
    sources = [source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]]
    assert all(list(HERE.glob(source)) for source in sources)
    copied = {path.name for path in copied_files()}
    needed = {path.parent.name for path in HERE.glob("*/*.py")} - {"tests", "bench", "examples"}
    assert needed | {"gunicorn.conf.py", "wsgi.py", "requirements.txt", "lanyard"} <= copied
    assert next(rest for step, rest in steps if step == "USER") == "10001:10001"


@pytest.fixture
def code() -> Iterator[Path]:
    """What is in the container, where any user may read it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for path in copied_files():
            copy: Callable[..., object] = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, Path(folder, path.name))
        Path(folder, ".venv").symlink_to(sys.prefix)
        yield Path(folder)


def test_the_containers_files_are_enough_for_server_and_commands(
    serve: Callable[..., Server], tmp_path: Path, code: Path
) -> None:
    """When root runs this, by any user of group 0, as on OpenShift."""
    data = tmp_path / "instance"
    data.mkdir()
    data.chmod(0o770)
    anyone = as_user(1_000_740_000) if os.geteuid() == 0 else ()
    start = f"cd {code} && exec .venv/bin/python -m gunicorn wsgi:app"
    server = serve(program=instead(*anyone, "sh", "-c", start)).wait()
    command = [*anyone, code / "lanyard", "agents", "create", "--name", "x", "--json"]
    created = subprocess.run(command, env=environment_of(data), text=True, capture_output=True)
    assert created.returncode == 0, created.stderr
    body = token_body(json.loads(created.stdout))
    assert requests.post(f"{server.url}/oauth/token", json=body).status_code == 200


def test_the_containers_context_is_what_it_copies() -> None:
    lines = (HERE / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert rules[-1] == "**/__pycache__"
    sources = {source for step, rest in container() if step == "COPY" for source in rest.split()[:-1]}
    assert set(rules[1:-1]) == {f"!{source.removeprefix('./')}" for source in sources}


def test_the_compose_file_builds_the_container_and_keeps_its_data() -> None:
    (name, service), *more = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items()
    assert (name, more) == ("lanyard", [])
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context == HERE
    assert (context / service["build"]["dockerfile"]).is_file()
    assert Settings.from_env(service["environment"]).trusted_proxies == 1
    image = (DEPLOY / "Containerfile").read_text()
    assert (service["read_only"], service.get("tmpfs")) == (True, None)
    for volume in service["volumes"]:
        assert f"VOLUME {volume.split(':')[1]}" in image
    assert [port.split(":")[0] for port in service["ports"]] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("file", "setting"), [("nginx.conf", r"keepalive_timeout (\d+)s;"), ("Caddyfile", r"keepalive (\d+)s\n")]
)
def test_a_proxy_closes_an_idle_connection_before_lanyard(file: str, setting: str) -> None:
    (proxy,) = re.findall(setting, (DEPLOY / file).read_text())
    (lanyard,) = re.findall(r"^keepalive = (\d+)$", (HERE / "gunicorn.conf.py").read_text(), re.MULTILINE)
    assert 30 <= int(proxy) <= int(lanyard) - 20


@needs("caddy", "caddy")
def test_caddy_takes_its_file() -> None:
    command = ["caddy", "validate", "--adapter", "caddyfile", "--config", DEPLOY / "Caddyfile"]
    told = subprocess.run(command, text=True, capture_output=True)
    assert told.returncode == 0, told.stderr


class Proxy(NamedTuple):
    """nginx, and the Lanyard behind it."""

    url: str
    port: int
    certificate: str
    server: Server
    token: str

    def ask(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        return requests.request(method, self.url + path, verify=self.certificate, **kwargs)

    def operate(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        return self.ask(method, path, headers={"Authorization": f"Bearer {self.token}"}, **kwargs)

    def agent(self) -> dict[str, str]:
        """A new agent's token request."""
        answer = self.operate("POST", "/api/agents", json={"name": "x", "scopes": ["read"]}).json()
        made = {name: answer[name] for name in ("client_id", "client_secret")}
        return {"grant_type": "client_credentials", **made}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("nginx")
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    server = Server(folder, TRUSTED_PROXIES="1", ISSUER=url)
    try:
        server.wait()
        token = (server.instance / "admin_token").read_text().strip()
        with nginx(folder, port, server.port):
            yield Proxy(url, port, str(folder / "certificate.pem"), server, token)
    finally:
        server.kill()


@through_nginx
def test_a_token_and_me_through_nginx(proxy: Proxy) -> None:
    token = proxy.ask("POST", "/oauth/token", json=proxy.agent()).json()
    header = {"Authorization": f"Bearer {token['access_token']}"}
    assert proxy.ask("GET", "/api/agents/me", headers=header).status_code == 200
    metadata = proxy.ask("GET", "/.well-known/oauth-authorization-server").json()
    assert metadata["token_endpoint"] == f"{proxy.url}/oauth/token"


@through_nginx
def test_an_event_has_the_true_address_despite_forged_headers(proxy: Proxy) -> None:
    lies = {"X-Forwarded-For": "203.0.113.7", "X-Real-IP": "203.0.113.7", "Forwarded": "for=203.0.113.7"}
    agent = proxy.agent()
    answer = proxy.ask("POST", "/oauth/token", json=agent, headers={**lies, "X-Request-Id": "mine-1"})
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (200, "mine-1")
    event = proxy.operate("GET", "/api/events?limit=1").json()["events"][0]
    assert (event["type"], event["address"], event["request_id"]) == ("token.issued", "127.0.0.1", "mine-1")


@through_nginx
def test_a_request_without_an_id_gets_one(proxy: Proxy) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", proxy.ask("GET", "/health").headers["X-Request-Id"])


@through_nginx
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_that_is_too_large_is_refused_in_the_one_shape(proxy: Proxy, chunked: bool) -> None:
    large = b'{"name": "' + b"x" * 70_000 + b'"}'
    answer = proxy.ask("POST", "/oauth/token", data=iter([large]) if chunked else large)
    assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")
    assert answer.headers["Content-Type"] == "application/json"


@through_nginx
def test_a_body_as_large_as_may_be_passes(proxy: Proxy) -> None:
    body = json.dumps({**proxy.agent(), "ignored": ""})
    body = body.replace('"ignored": ""', f'"ignored": "{"x" * (65_536 - len(body))}"')
    header = {"Content-Type": "application/json"}
    assert (len(body), proxy.ask("POST", "/oauth/token", data=body, headers=header).status_code) == (
        65_536,
        200,
    )


@through_nginx
@pytest.mark.parametrize("path", ["/metrics", "/%6detrics", "/x/../metrics", "//metrics", "/metrics?a=b"])
def test_nginx_does_not_expose_metrics(proxy: Proxy, path: str) -> None:
    with requests.Session() as session:
        asked = requests.Request("GET", proxy.url, headers={"Authorization": f"Bearer {proxy.token}"})
        prepared = asked.prepare()
        prepared.url = proxy.url + path
        answer = session.send(prepared, verify=proxy.certificate)
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


@through_nginx
def test_one_connection_to_lanyard_serves_many_requests(proxy: Proxy) -> None:
    def connections() -> set[str]:
        table = Path("/proc/net/tcp").read_text().splitlines()[1:]
        upstream = f"0100007F:{proxy.server.port:04X}"
        return {line.split()[1] for line in table if line.split()[2] == upstream and line.split()[3] == "01"}

    proxy.ask("GET", "/health")
    before = connections()
    for _ in range(10):
        assert proxy.ask("GET", "/health").status_code == 200
    assert before
    assert connections() == before


@through_nginx
def test_nginx_answers_503_in_the_one_shape_without_lanyard(tmp_path: Path) -> None:
    port = free_port()
    with nginx(tmp_path, port, free_port()):
        certificate = str(tmp_path / "certificate.pem")
        answer = requests.get(f"https://127.0.0.1:{port}/health", verify=certificate)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"
