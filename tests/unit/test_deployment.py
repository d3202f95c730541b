"""The container files are held against the settings and the command, since no engine runs them here."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.cli.command import cli
from service.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    found: dict[str, Any] = compose["services"]["rankpress"]
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


def known_variables() -> set[str]:
    return {f"RANKPRESS_{name.upper()}" for name in Settings.model_fields}


def test_every_variable_is_a_setting(service: dict[str, Any], dockerfile: str) -> None:
    named = set(service["environment"]) | set(re.findall(r"\b(RANKPRESS_[A-Z_]+)=", dockerfile))
    assert named
    assert named <= known_variables()


def test_the_command_and_its_options_exist(service: dict[str, Any], dockerfile: str) -> None:
    in_image = yaml.safe_load(dockerfile.rsplit("CMD ", maxsplit=1)[-1])
    for program, name, *options in (service["command"], in_image):
        assert program == "rankpress"
        command = cli.commands[name]
        accepted = {option for parameter in command.params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= accepted


def test_jobs_have_time_to_give_their_lease_back(service: dict[str, Any]) -> None:
    grace_seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > Settings.model_fields["drain_grace_seconds"].default


def test_data_outlives_the_container(service: dict[str, Any], dockerfile: str) -> None:
    folder = service["command"][service["command"].index("--data") + 1]
    assert any(volume.split(":")[1] == folder for volume in service["volumes"])
    assert f"VOLUME {folder}" in dockerfile


def test_the_health_check_asks_a_route_that_exists(dockerfile: str) -> None:
    from service.app import document

    path = re.search(r"http://127\.0\.0\.1:8080(/\S+?)'", dockerfile)
    assert path is not None
    assert path[1] in document()["paths"]


def test_the_image_copies_what_exists(dockerfile: str) -> None:
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_torch_is_pinned_alike_everywhere(dockerfile: str) -> None:
    pinned = re.search(r'TORCH_REQUIREMENT="(torch==[\d.]+)"', dockerfile)
    assert pinned is not None
    assert pinned[1] in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f'"{pinned[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
