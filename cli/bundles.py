"""Options that many commands share, as one parameter of theirs.

A bundle is a frozen dataclass whose fields are annotated like the parameters of a command. A
command that takes a bundle has its fields as options, after its own:

    @bundled
    def locality(source: Source, reads: Reads, shown: Shown) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from .options import (
    AnalysedText,
    ChatTemplate,
    Json,
    PictureFile,
    PictureTheme,
    SampleSize,
    Seed,
    SequenceLength,
    Stream,
    Theme,
    TrustRemoteCode,
)

__all__ = ["Reads", "Shown", "bundled"]


@dataclass(frozen=True)
class Reads:
    """The text of an analysis, and how a model runs it."""

    data: AnalysedText = None
    sample_size: SampleSize = None
    sequence_length: SequenceLength = None
    chat_template: ChatTemplate = False
    seed: Seed = 0
    trust_remote_code: TrustRemoteCode = False
    stream: Stream = None

    def about_text(self) -> list[str]:
        """The options given that say what a model is to read."""
        given = {
            "--data": self.data,
            "--sample-size": self.sample_size,
            "--sequence-length": self.sequence_length,
            "--chat-template": self.chat_template or None,
        }
        return [option for option, value in given.items() if value is not None]


@dataclass(frozen=True)
class Shown:
    """How a result is shown."""

    output: PictureFile = None
    theme: PictureTheme = Theme.LIGHT
    json: Json = False


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the fields of its bundles as parameters, as typer reads them."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    shared: list[inspect.Parameter] = []
    bundles: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and is_dataclass(kind):
            bundles[name] = kind
            shared += _fields_of(kind)
        else:
            parameters.append(
                parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)
            )

    parameters += shared

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in bundles.items():
            given[name] = kind(**{each.name: given.pop(each.name) for each in fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _fields_of(bundle: type) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=hints[each.name],
        )
        for each in fields(bundle)
    ]
