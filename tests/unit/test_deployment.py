"""The container files are held against the settings and the command, since no engine runs them here."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement

from service.cli.command import cli
from service.cli.serve import SHUTDOWN_SECONDS
from service.cli.worker import STUCK_SECONDS
from service.jobs.looks import LOOK_SECONDS
from service.settings import Settings

ROOT = Path(__file__).parents[2]
REQUIRED = {"POSTGRES_PASSWORD": "p", "REDIS_PASSWORD": "r", "RANKPRESS_API_KEY": "a-key-of-sixteen-characters"}
OURS = ("migrate", "api", "worker-cpu", "worker-gpu")
LASTING = ("postgres", "redis", "api", "worker-cpu", "worker-gpu")


def interpolated(text: str, environment: dict[str, str]) -> str:
    """What compose makes of `${NAME}`, `${NAME:-default}` and `${NAME:?message}`."""

    def value(found: re.Match[str]) -> str:
        name, how, more = found.groups()
        if environment.get(name):
            return environment[name]
        assert how == ":-", f"{name} is needed: {more}"
        return more

    return re.sub(r"(?<!\$)\$\{([A-Z_]+)(?:(:[-?])([^}]*))?\}", value, text).replace("$$", "$")


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.fixture(scope="module")
def raw() -> str:
    return (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compose(raw: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(interpolated(raw, REQUIRED))
    return found


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stages(dockerfile: str) -> dict[str, str]:
    """The text of each stage by its name, with that of the stages it stands on."""
    found: dict[str, str] = {}
    for part in re.split(r"^(?=FROM )", dockerfile, flags=re.MULTILINE)[1:]:
        head = re.match(r"FROM (\S+) AS (\S+)\n", part)
        assert head is not None, part
        found[head[2]] = found.get(head[1], "") + part
    return found


def check_command(words: list[str]) -> None:
    """The command, its subcommand and its options exist."""
    assert words[0] == "rankpress", words
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    accepted = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= accepted, words


def test_every_variable_is_a_setting(services: dict[str, dict[str, Any]], dockerfile: str) -> None:
    known = {f"RANKPRESS_{name.upper()}" for name in Settings.model_fields}
    named = {name for name in OURS for name in services[name]["environment"] if name.startswith("RANKPRESS_")}
    named |= set(re.findall(r"\b(RANKPRESS_[A-Z_]+)=", dockerfile))
    assert len(named) >= 6
    assert named <= known


def test_the_settings_fit(services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        for variable, value in services[name]["environment"].items():
            if variable.startswith("RANKPRESS_"):
                monkeypatch.setenv(variable, str(value))
        settings = Settings()
        assert not settings.embedded
        assert settings.resolved_database_url.startswith("postgresql+psycopg://rankpress:p@postgres:")
        assert settings.broker_url == "redis://:r@redis:6379/0"
    shared = [{key: services[name]["environment"][key] for key in services["migrate"]["environment"]} for name in OURS]
    assert all(one == shared[0] for one in shared)


def test_what_is_needed_is_asked_for(raw: str) -> None:
    for missing in REQUIRED:
        with pytest.raises(AssertionError, match=missing):
            interpolated(raw, {**REQUIRED, missing: ""})
    assert not re.search(r"(?i)(password|key): (?!\$)\S", raw)


def test_the_commands_and_their_options_exist(services: dict[str, dict[str, Any]], dockerfile: str) -> None:
    in_images = [yaml.safe_load(words) for words in re.findall(r"CMD (\[\"rankpress\".*\])$", dockerfile, re.MULTILINE)]
    assert len(in_images) == 4
    in_services = [services[name]["command"] for name in OURS]
    probes = [services[name]["healthcheck"]["test"][1:] for name in ("worker-cpu", "worker-gpu")]
    for words in in_images + in_services + probes:
        check_command(words)


def test_targets_and_build_arguments_exist(services: dict[str, dict[str, Any]], stages: dict[str, str]) -> None:
    for name in OURS:
        build = services[name]["build"]
        assert build["target"] == name.partition("-")[0].replace("migrate", "api")
        for argument in build.get("args", {}):
            assert f"ARG {argument}=" in stages["build-worker"]
    assert list(stages)[-1] == "embedded"  # what `docker build .` builds


def test_images_are_what_their_services_need(stages: dict[str, str]) -> None:
    for name in ("api", "worker", "embedded"):
        text = stages[name]
        assert "\nUSER rankpress\n" in text
        assert "STOPSIGNAL SIGTERM" in text
        assert "HEALTHCHECK" in text
        assert "CMD [" in text
        assert f"COPY --from=build-{name} " in text
        assert text.index("useradd") < text.index("USER rankpress")
    extra = {"api": "api", "worker": "worker", "embedded": "all"}
    for name, wanted in extra.items():
        assert f'".[{wanted}]"' in stages[f"build-{name}"]
        assert ("TORCH_REQUIREMENT" in stages[f"build-{name}"]) == (name != "api")


def test_the_api_needs_no_torch() -> None:
    """Nothing that the extra `api` names has torch among what it needs itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["api"]]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower()
        extras = requirement.extras or {""}
        if name in seen:
            continue
        seen.add(name)
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    assert {"fastapi", "celery", "sqlalchemy", "starlette"} <= seen
    assert not seen & {"torch", "numpy", "nvidia-ml-py"}


def test_jobs_have_time_to_give_their_lease_back(services: dict[str, dict[str, Any]]) -> None:
    needed = Settings.model_fields["drain_grace_seconds"].default + STUCK_SECONDS
    for name in ("worker-cpu", "worker-gpu"):
        assert seconds(services[name]["stop_grace_period"]) > needed
    assert seconds(services["api"]["stop_grace_period"]) > SHUTDOWN_SECONDS


def test_every_service_is_watched_and_held(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
        assert "no-new-privileges:true" in service["security_opt"]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["init"] is True
        assert service["logging"]["options"]["max-size"]
        if name in LASTING:
            assert service["restart"] == "unless-stopped"
            assert {"test", "interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys()
    assert services["migrate"]["restart"].startswith("on-failure")
    assert services["migrate"]["healthcheck"] == {"disable": True}  # it ends
    assert {name for name, service in services.items() if "ports" in service} == {"api"}
    assert services["api"]["ports"] == ["127.0.0.1:8080:8080"]


def test_who_waits_for_whom(services: dict[str, dict[str, Any]]) -> None:
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("api", "worker-cpu", "worker-gpu"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "test" in services[other]["healthcheck"]


def test_the_broker_keeps_its_bells(services: dict[str, dict[str, Any]]) -> None:
    words = services["redis"]["command"]
    told = dict(zip(words[1::2], words[2::2], strict=True))
    assert (told["--appendonly"], told["--maxmemory-policy"], told["--requirepass"]) == ("yes", "noeviction", "r")
    assert services["redis"]["environment"]["REDISCLI_AUTH"] == told["--requirepass"]


def test_data_outlives_the_containers(
    compose: dict[str, Any], services: dict[str, dict[str, Any]], stages: dict[str, str]
) -> None:
    mounts = {
        name: dict(volume.split(":")[::-1] for volume in service.get("volumes", []))
        for name, service in services.items()
    }
    assert {volume for mounted in mounts.values() for volume in mounted.values()} == set(compose["volumes"])
    assert mounts["postgres"] == {"/var/lib/postgresql/data": "database"}
    assert mounts["redis"] == {"/data": "redis"}
    for name in ("api", "worker-cpu", "worker-gpu"):
        words, blob_url = services[name]["command"], services[name]["environment"]["RANKPRESS_BLOB_URL"]
        assert mounts[name][blob_url.removeprefix("file://")] == "blobs"
        assert mounts[name].keys() >= {words[words.index("--data") + 1]}
        # A new volume takes the folder's owner from the image.
        for folder in mounts[name]:
            assert re.search(rf"install -d -o rankpress .*{folder}\b", stages[services[name]["build"]["target"]])
    assert "VOLUME /data" in stages["embedded"]


def test_a_gpu_belongs_to_one_worker(raw: str, services: dict[str, dict[str, Any]]) -> None:
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    assert (services["worker-gpu"]["profiles"], services["worker-cpu"]["profiles"]) == (["gpu"], ["cpu"])
    for queue in ("gpu", "cpu"):
        words = services[f"worker-{queue}"]["command"]
        assert words[words.index("--queue") + 1] == queue
    # The second one, as the comment says it is added.
    comment = raw[raw.index("  #   worker-gpu-1:") : raw.index("  worker-gpu: &worker-gpu")]
    more = re.sub(r"^  #   ", "  ", comment, flags=re.MULTILINE)
    added = raw.replace("\nvolumes:\n", f"\n{more}\nvolumes:\n")
    second = yaml.safe_load(interpolated(added, REQUIRED))["services"]["worker-gpu-1"]
    assert second["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["1"]
    assert second["command"] == services["worker-gpu"]["command"]


def test_the_health_checks_ask_a_route_that_exists(services: dict[str, dict[str, Any]], stages: dict[str, str]) -> None:
    from service.app import document

    asked = re.findall(r"http://127\.0\.0\.1:8080(/\S+?)'", stages["api"] + stages["embedded"])
    asked += re.findall(r"http://127\.0\.0\.1:8080(/\S+?)'", services["api"]["healthcheck"]["test"][-1])
    assert len(asked) == 3
    # The route takes as long as its slowest part, up to a bound.
    for text in (stages["api"], stages["embedded"], str(services["api"]["healthcheck"])):
        within = re.search(r"timeout=(\d+)\)", text)
        assert within is not None
        assert int(within[1]) > LOOK_SECONDS
    assert seconds(services["api"]["healthcheck"]["timeout"]) > LOOK_SECONDS
    assert set(asked) <= set(document()["paths"])


def test_the_image_copies_what_exists_and_is_sent(dockerfile: str) -> None:
    allowed = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_torch_is_pinned_alike_everywhere(dockerfile: str) -> None:
    pinned = re.search(r'TORCH_REQUIREMENT="(torch==[\d.]+)"', dockerfile)
    assert pinned is not None
    assert pinned[1] in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f'"{pinned[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_compose_itself_takes_it() -> None:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("needs docker; this machine has none")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker's compose plugin; this machine has none")
    for profiles in ([], ["--profile", "cpu"], ["--profile", "cpu", "--profile", "gpu"]):
        command = [docker, "compose", *profiles, "config", "--quiet"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **REQUIRED}
        )
        assert done.returncode == 0, done.stderr
