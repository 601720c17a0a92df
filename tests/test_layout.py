"""The layout: imports point one way, files are short, management routes are guarded, tests stand alone."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from flask import Flask

from app import GUARDS
from config import HERE

FOLDERS = ("webhooks", "console", "ops", "storage", "migrations", "commands")
# Each floor imports from those before it only. A folder counts as one.
FLOORS = (
    {"config", "models", "api", "storage"},
    {"database", "schemas"},
    {"credentials", "events", "migrations", "oauth_schemas"},
    {"keys", "client_auth", "agents", "webhooks"},
    {"auth", "tokens", "ops"},
    {"oauth", "console"},
    {"app", "gunicorn.conf"},
    {"wsgi", "commands"},
)
MOST_MODULES = 17
MOST_LINES = 600
MOST_LINES_OF_A_FUNCTION = 40
# Lines of what runs in production: what there was, and the price of each capability since.
PRICES = {
    "the first small version": 8_200,
    "rate limits of any 60 seconds, limits of rotations": 78,
    "failed sign-ins in the audit log, counted by agent": 53,
    "guesses behind ports and proxies, clocks set back": 14,
    "refresh tokens that need client credentials": 27,
    "one warning of a kind a minute": 56,
    "access ended on a full disk": 125,
    "receivers that do harm": 65,
    "even and strict assertions, lost audiences": 42,
    "audiences and issuers compared as URIs": 56,
    "discovery, links and sentences that clients expect": 52,
    "a database that is not the server's": 90,
    "hosts: containers, mounts, terminals, Kubernetes": 101,
}
LONGEST_TEST_NAME = 70


def product() -> list[Path]:
    """Every module that runs in production, but for the numbered migrations."""
    found = [*HERE.glob("*.py"), *(file for name in FOLDERS for file in (HERE / name).rglob("*.py"))]
    return sorted(file for file in found if file.parent.name != "versions")


def unit_of(file: Path) -> str:
    """The module's name, or its folder's."""
    return file.stem if file.parent == HERE else file.relative_to(HERE).parts[0]


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(node: ast.AST) -> Iterator[str]:
    """What is imported at run time: what only type checkers see does not count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").partition(".")[0]
        yield from imports(child)


def test_every_module_has_its_floor() -> None:
    assert {unit_of(file) for file in product()} <= set().union(*FLOORS)


@pytest.mark.parametrize("file", product(), ids=lambda file: str(file.relative_to(HERE)))
def test_imports_point_to_lower_floors_only(file: Path) -> None:
    own = unit_of(file)
    lower: set[str] = set()
    for floor in FLOORS:
        if own in floor:
            break
        lower |= floor
    ours = set(imports(tree_of(file))) & set().union(*FLOORS)
    assert ours <= lower | ({own} if file.parent != HERE else set())


def test_modules_of_a_folder_import_each_other_in_no_circle() -> None:
    for folder in FOLDERS:
        names = {file.stem for file in (HERE / folder).glob("*.py")}
        needs = {name: _inner_imports(HERE / folder / f"{name}.py", folder) & names for name in names}
        while needs:
            free = {name for name, needed in needs.items() if not needed & needs.keys()}
            assert free, f"a circle in {folder}: {needs}"
            needs = {name: needed for name, needed in needs.items() if name not in free}


def _inner_imports(file: Path, folder: str) -> set[str]:
    found = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ImportFrom)]
    plain = {alias.name for node in found if node.module == folder for alias in node.names}
    return plain | {
        str(node.module).removeprefix(f"{folder}.")
        for node in found
        if str(node.module).startswith(f"{folder}.")
    }


def test_few_modules_lie_at_the_top_level() -> None:
    assert len(list(HERE.glob("*.py"))) <= MOST_MODULES


@pytest.mark.parametrize("file", product(), ids=lambda file: str(file.relative_to(HERE)))
def test_files_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


def test_the_whole_is_small() -> None:
    assert sum(len(file.read_text().splitlines()) for file in product()) <= sum(PRICES.values())


def test_every_blueprint_under_api_is_guarded(make_app: Callable[..., Flask]) -> None:
    rules = [rule for rule in make_app().url_map.iter_rules() if rule.rule.startswith("/api")]
    assert {rule.endpoint.rpartition(".")[0] for rule in rules} <= GUARDS.keys()


def files_of_tests() -> list[Path]:
    return sorted((HERE / "tests").glob("*.py"))


def test_no_test_file_imports_another() -> None:
    files = files_of_tests()
    names = {file.stem for file in files}
    assert {file.stem: found for file in files if (found := names & set(imports(tree_of(file))))} == {}


def test_test_files_and_their_names_are_short() -> None:
    for file in files_of_tests():
        assert len(file.read_text().splitlines()) <= MOST_LINES, file.name
        for node in tree_of(file).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name.removeprefix("test_")) <= LONGEST_TEST_NAME, node.name
