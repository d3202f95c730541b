import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEGABYTES_MAX = 25
TOOLS = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils-precedence")
FORBIDDEN = ("torch", "celery", "fastapi", "sqlalchemy", "numpy")


def pip(python: Path | str, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("pip reaches no packages from here")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that what an earlier build left behind does not slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in ("service", "worker", "migrations"):
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, source)
    return next(folder.glob("rankpress-*.whl"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its base dependencies, and nothing else."""
    environment = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip(environment / "bin" / "python", "install", "--constraint", ROOT / "constraints.txt", wheel)
    return environment


def run(bare: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [bare / "bin" / command[0], *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        cwd=bare,
        env={"PATH": str(bare / "bin"), "HOME": str(bare)},
    )


def test_the_wheel_carries_what_a_service_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "service/py.typed",
        "migrations/env.py",
        "migrations/script.py.mako",
        "migrations/versions/0001_initial.py",
    }
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "service" / "ui").rglob("*") if path.is_file()}
    assert expected | {name for name in pages if "__pycache__" not in name} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_client_and_command_are_small(bare: Path) -> None:
    packages = bare / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    installed = [path for path in packages.iterdir() if not path.name.startswith(TOOLS)]
    names = {path.name for path in installed}
    assert "service" in names
    assert not names & set(FORBIDDEN)
    files = [file for path in installed for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    assert megabytes <= MEGABYTES_MAX, f"{megabytes:.1f} MB installed, byte code included"


def test_client_and_command_work_alone(bare: Path) -> None:
    assert "compress" in run(bare, "rankpress", "--help").stdout
    imported = run(bare, "python", "-c", "from service.client import Client; Client().close()")
    assert imported.returncode == 0, imported.stderr
    away = run(bare, "rankpress", "jobs", "--url", "http://127.0.0.1:9")
    assert away.returncode == 5, away.stderr


@pytest.mark.parametrize("command", ["serve", "worker", "migrate", "doctor", "keys list"])
def test_a_command_that_needs_more_says_what(bare: Path, command: str) -> None:
    refused = run(bare, "rankpress", *command.split())
    assert refused.returncode == 2
    assert "pip install 'rankpress[" in refused.stderr
