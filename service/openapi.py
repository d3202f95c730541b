"""`python -m service.openapi [--check]`: the pages of docs/ that are made from the code and never drift from it."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from click import Context, Group
from pydantic.fields import FieldInfo

from service.app import document
from service.cli.command import cli as command
from service.contract.errors import ErrorCode, ProblemError, title_of
from service.contract.plan import REASON_MEANINGS
from service.settings import Settings

HELP_WIDTH = 110
DOCS = Path(__file__).parent.parent / "docs"


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {
        "openapi.json": json.dumps(document(), indent=2, ensure_ascii=False) + "\n",
        "problems.md": _problems_page(),
        "reasons.md": _reasons_page(),
        "settings.md": _settings_page(),
        "command.md": _command_page(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or with `--check` say which of them differ from the code (exit code 1)."""
    parser = argparse.ArgumentParser(prog="python -m service.openapi", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = [name for name, text in pages().items() if _read(DOCS / name) != text]
    for name in stale:
        if check:
            sys.stderr.write(f"docs/{name} is out of date: run python -m service.openapi\n")
        else:
            (DOCS / name).write_text(pages()[name], encoding="utf-8")
            sys.stderr.write(f"docs/{name} written\n")
    return 1 if check and stale else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _problems_page() -> str:
    lines = [
        "# Problems",
        "",
        "Every refusal is an `application/problem+json` object (RFC 9457) with `type`, `title`, `status`, `detail`,",
        "`code`, `request_id` and `errors[]` (`pointer`, `code`, `message`). A failed job carries the same object in",
        "`problem`. The list of codes is closed. This page is generated: `python -m service.openapi`.",
        "",
        "| code | status | meaning |",
        "| --- | --- | --- |",
        *(f"| `{code.value}` | {ProblemError(code, '').status} | {title_of(code)} |" for code in ErrorCode),
    ]
    return "\n".join(lines) + "\n"


def _reasons_page() -> str:
    lines = [
        "# Reasons",
        "",
        "Why a layer or a term of the layer plan is what it is. The list of codes is closed.",
        "This page is generated: `python -m service.openapi`.",
        "",
        "| code | meaning |",
        "| --- | --- |",
        *(f"| `{code.value}` | {meaning} |" for code, meaning in REASON_MEANINGS.items()),
    ]
    return "\n".join(lines) + "\n"


def _settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Every setting is read from an environment variable when a process starts. Sizes are bytes, times seconds.",
        "This page is generated: `python -m service.openapi`.",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
        *(
            f"| `RANKPRESS_{name.upper()}` | {_default(field)} | {field.description} |"
            for name, field in Settings.model_fields.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "the user's data directory"
    return "" if field.default in {None, ""} else f"`{field.default}`"


def _command_page() -> str:
    width: dict[str, Any] = {"max_content_width": HELP_WIDTH, "terminal_width": HELP_WIDTH}
    top = Context(command, info_name="rankpress", **{**command.context_settings, **width})
    lines = [
        "# The command",
        "",
        "Exit codes: 0 done, 1 failed or canceled, 2 wrong usage, 3 budget missed, 4 timeout, 5 service away.",
        "This page is generated: `python -m service.openapi`.",
    ]
    for context in [top, *_contexts_below(top)]:
        lines += ["", f"## {context.command_path}", "", "```text", context.get_help(), "```"]
    return "\n".join(lines) + "\n"


def _contexts_below(parent: Context) -> Iterator[Context]:
    commands = parent.command.commands if isinstance(parent.command, Group) else {}
    for name, found in sorted(commands.items()):
        context = Context(found, info_name=name, parent=parent, max_content_width=HELP_WIDTH, terminal_width=HELP_WIDTH)
        yield context
        yield from _contexts_below(context)


if __name__ == "__main__":
    sys.exit(main())
