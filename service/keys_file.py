"""The API key of a service that was given none: made once and kept in the data directory for its owner alone."""

import os
import secrets
from pathlib import Path

from service.contract.keys import new_api_key
from service.settings import MIN_API_KEY_LENGTH, Settings

_OWNER_ONLY = 0o600


def ensure_api_key(settings: Settings) -> tuple[str | None, Path | None]:
    """Return the configured key, or the one in the data directory with its path; the first call makes it.

    A service of several machines has no such file: without a configured key it goes by those in the database alone.
    Safe to repeat and to race: the file appears under its name whole, and whoever comes second reads the first one's.
    """
    if settings.api_key is not None:
        return settings.api_key.get_secret_value(), None
    if not settings.embedded:
        return None, None
    path = settings.key_file
    if not path.exists():
        _make(path)
    key = path.read_text(encoding="ascii", errors="replace").strip()
    if len(key) < MIN_API_KEY_LENGTH:
        raise ValueError(
            f"expected a key of at least {MIN_API_KEY_LENGTH} characters in {path}; found {len(key)}: "
            "delete the file to have a new one made, or set RANKPRESS_API_KEY"
        )
    return key, path


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{new_api_key()}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike a rename it never replaces a key that another process has just made
        except FileExistsError:
            return
    finally:
        draft.unlink()
