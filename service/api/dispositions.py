"""File names that go over the wire: Content-Disposition written and read (RFC 6266)."""

import re
from urllib.parse import quote, unquote

MAX_NAME = 200
_EXTENDED = re.compile(r"filename\*\s*=\s*utf-8'[^']*'([^;\s]+)", re.IGNORECASE)
_PLAIN = re.compile(r'filename\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]+))', re.IGNORECASE)


def attachment(name: str) -> str:
    """Write the header of a download: an ASCII name for all clients and the true one beside it."""
    plain = re.sub(r"[^A-Za-z0-9._\- ]", "_", name) or "download"
    header = f'attachment; filename="{plain}"'
    return header if plain == name else f"{header}; filename*=UTF-8''{quote(name, safe='')}"


def file_name(header: str | None) -> str | None:
    """Read the file name of an upload; it is shown to people and never becomes a path."""
    if not header:
        return None
    extended = _EXTENDED.search(header)
    if extended:
        return clean_name(unquote(extended.group(1), errors="replace"))
    plain = _PLAIN.search(header)
    if not plain:
        return None
    return clean_name(re.sub(r"\\(.)", r"\1", plain.group(1)) if plain.group(1) is not None else plain.group(2))


def clean_name(name: str | None) -> str | None:
    """Keep of a name what can be shown: its last path part, without control characters, at most 200 characters."""
    if name is None:
        return None
    last = re.split(r"[/\\]", name.encode("utf-8", "replace").decode())[-1]
    shown = "".join(character for character in last if character.isprintable()).strip()
    return shown[:MAX_NAME] or None
