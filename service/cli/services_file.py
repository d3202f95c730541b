"""Where the command finds the key of an embedded service: a file of the user's that maps URLs to key files."""

import json
import os
import tempfile
from pathlib import Path


def services_file() -> Path:
    """`rankpress/services.json` in the user's state directory (XDG base directories)."""
    state_home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state_home) / "rankpress" / "services.json"


def normalized(url: str) -> str:
    """One spelling for the addresses that reach the same service on this machine."""
    return url.rstrip("/").replace("://localhost", "://127.0.0.1", 1)


def record(url: str, key_file: Path) -> None:
    """Remember a service's key file, and forget those whose key file is gone."""
    path = services_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {known_url: file for known_url, file in _read(path).items() if Path(file).is_file()}
    known[normalized(url)] = str(key_file.absolute())
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(known, file, indent=2)
    Path(file.name).replace(path)


def find_key(url: str) -> str | None:
    """The key of the embedded service at this address, if it was started here by this user."""
    key_file = _read(services_file()).get(normalized(url))
    if key_file is None:
        return None
    try:
        return Path(key_file).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(url): str(file) for url, file in known.items()} if isinstance(known, dict) else {}
