"""The help of a command with many options: a heading for those that belong together."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class Grouped(TyperCommand):
    """Shows each option under its `rich_help_panel`; those without one come last.

    What typer makes of the panels itself needs rich, whose import takes longer than the help.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        rest: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is None:
                continue
            panel = getattr(parameter, "rich_help_panel", None)
            if parameter.param_type_name == "argument":
                panel = "Arguments"
            (rest if panel is None else groups.setdefault(panel, [])).append(row)
        for heading, rows in [*groups.items(), ("Options", rest)]:
            with formatter.section(heading):
                formatter.write_dl(rows)
