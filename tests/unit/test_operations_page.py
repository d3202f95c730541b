"""What docs/operations.md names is there: commands and options, variables, metrics, routes, log events."""

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from service.cli.command import cli
from service.settings import Settings

ROOT = Path(__file__).parents[2]
OF_CONTAINERS = {"RANKPRESS_LISTEN"}


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def code(page: str) -> list[str]:
    """Every line of a block of code, and every piece of code within a sentence."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    sentences = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`]+)`", sentences)


def commands(code: list[str]) -> list[list[str]]:
    found = [re.search(r"(?:^|=\S*/|api )rankpress (\w.*)", line) for line in code]
    lines = [shlex.split(match[1], comments=True) for match in found if match]
    return [words for words in lines if words[0] in cli.commands]


def test_commands_and_options_exist(code: list[str]) -> None:
    all_words = commands(code)
    assert len(all_words) >= 12
    assert {words[0] for words in all_words} >= {"serve", "worker", "migrate", "doctor", "keys"}
    for words in all_words:
        command: click.Command = cli
        rest = list(words)
        while isinstance(command, click.Group) and rest:
            command = command.commands[rest.pop(0)]
        accepted = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= accepted, words


def test_variables_are_settings(page: str) -> None:
    known = {f"RANKPRESS_{name.upper()}" for name in Settings.model_fields} | OF_CONTAINERS
    named = set(re.findall(r"RANKPRESS_[A-Z_]+", page))
    assert len(named) > 15
    assert named <= known
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    of_compose = set(re.findall(r"`((?:WORKER|TORCH|POSTGRES|REDIS)_[A-Z_]+|RANKPRESS_LISTEN)`", page)) - {
        "WORKER_LOST"
    }
    assert len(of_compose) == 7
    assert all(f"${{{name}:" in compose for name in of_compose)


def test_defaults_are_told_as_they_are(page: str) -> None:
    default = {name: field.default for name, field in Settings.model_fields.items()}
    for name, said in re.findall(r"`RANKPRESS_([A-Z_]+)` \((\d+)\)", page):
        assert float(said) == default[name.lower()], name
    assert default["reap_seconds"] == 40  # "40 s after its last heartbeat"
    assert default["heartbeat_seconds"] == 2
    assert default["reconcile_seconds"] == 5
    assert default["worker_gone_seconds"] == 60
    assert default["orphan_seconds"] == 24 * 3600
    assert default["checkpoint_keep_seconds"] == 7 * 24 * 3600
    assert default["checkpoint_seconds"] * 3 == 900
    assert default["cache_bytes"] == 32 * 2**30


def test_metrics_and_routes_are_there(page: str, tmp_path: Path) -> None:
    from service.api.metrics import Metrics
    from service.app import document
    from service.services import build_services
    from service.store.migration import migrate

    services = build_services(Settings(data_dir=tmp_path))
    migrate(services.database)
    samples = {sample.name for family in Metrics(services).registry.collect() for sample in family.samples}
    services.database.dispose()
    histograms = {"rankpress_http_request_duration_seconds"}
    named = set(re.findall(r"\brankpress_[a-z_]+", page)) - histograms
    assert len(named) >= 10
    assert named <= samples
    paths = {path.replace("{job_id}", "{id}") for path in document()["paths"]}
    asked = {route.partition("?")[0] for route in re.findall(r"(/v1/[a-z/{}]*[a-z}])", page)}
    assert len(asked) >= 8
    assert asked <= paths


def test_log_events_are_written(page: str) -> None:
    source = "".join(
        path.read_text(encoding="utf-8") for folder in ("service", "worker") for path in (ROOT / folder).rglob("*.py")
    )
    table = page[page.index("## What goes wrong") : page.index("## Keys")]
    events = set(re.findall(r"`([a-z]+_[a-z_]+)`", table)) & set(re.findall(r'\(\s*"([a-z_]+)"', source))
    assert events >= {"heartbeat_failed", "bell_failed", "worker_deaf", "write_refused", "lease_expired"}


def test_units_stop_as_workers_do(page: str) -> None:
    units = re.findall(r"^```ini\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(units) == 2
    for text in units:
        unit = configparser.ConfigParser(interpolation=None, strict=True)
        unit.optionxform = str  # type: ignore[method-assign,assignment]
        unit.read_string(text)
        assert unit["Service"]["KillMode"] == "mixed"
        assert unit["Service"]["Restart"] == "always"
        assert int(unit["Service"]["TimeoutStopSec"]) >= 30
        assert f"/var/lib/{unit['Service']['StateDirectory']}" in unit["Service"]["ExecStart"]
    assert "TimeoutStopSec=45" in units[1]
