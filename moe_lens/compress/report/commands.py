"""The command lines that make a smaller model again and measure it again, ready to be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moe_lens.compress.calibration.texts import bundled
from moe_lens.compress.choice.asked import Asked
from moe_lens.compress.merging.merging import Merging
from moe_lens.compress.plan.identity import public_name
from moe_lens.compress.plan.plan import Plan
from moe_lens.corpus import Corpus
from moe_lens.families import AUTO

_OWN_NAMES = {"repair_steps": "repair-router"}
"""Fields of `Asked` whose option has another name."""

_NO_EFFECT = ("plan", "merging", "statistics_file")
"""Fields that are written in another way, or change nothing about the result."""


@dataclass(frozen=True)
class Commands:
    """Words of three command lines; `compress` and `verify` are None where words cannot say it.

    `plan` applies the plan.json of the folder it is run in, `compress` does all of it again, and
    `verify` measures the model in the folder it is run in.
    """

    plan: tuple[str, ...]
    compress: tuple[str, ...] | None = None
    verify: tuple[str, ...] | None = None

    @property
    def local(self) -> bool:
        """Whether they name a model or text that lies neither on the hub nor comes with moe-lens.

        Those are named by the last part of their path.
        """
        words = self.plan
        named = [
            words[words.index(each) + 1] for each in ("--data", "--eval-data") if each in words
        ]
        parent = words[2]
        return not (parent == "demo" or "/" in parent) or not all(map(bundled, named))

    def to_dict(self) -> dict[str, str | None]:
        """As lines for a shell, quoted where that is needed."""
        return {
            name: None if words is None else shlex.join(words) for name, words in vars(self).items()
        }


@dataclass(frozen=True)
class Texts:
    """Both texts of a compression as they were given, and how they were read."""

    calibration: Corpus | str | Path | None
    evaluation: Corpus | str | Path | None
    sample_size: int | None
    sequence_length: int | None
    chat_template: bool
    seed: int
    cpu_experts: str = AUTO

    def words(self, defaults: Mapping[str, Any], *given: tuple[str, Any]) -> list[str] | None:
        """Options for what is not the default; None where an option cannot say it."""
        if self.sample_size is None or self.sequence_length is None:
            return None
        found: list[str] = []
        for option, text in given:
            if isinstance(text, Corpus):
                return None
            if text is not None:
                found += [option, public_name(text)]
        for name in ("sample_size", "sequence_length", "seed", "cpu_experts"):
            if getattr(self, name) != defaults[name]:
                found += [_option(name), str(getattr(self, name))]
        return [*found, "--chat-template"] if self.chat_template else found


def commands(
    plan: Plan,
    output: str,
    asked: Asked | None = None,
    texts: Texts | None = None,
    defaults: Mapping[str, Any] | None = None,
    *,
    format: str = "mlx",
    trust_remote_code: bool = False,
) -> Commands:
    """The commands for a smaller model.

    Folders and files are named by their last part, as a plan names them: where they lie on a disk
    is nobody's business.

    Args:
        plan: Of the model.
        output: The name of its folder; another model gets another name.
        asked: What was asked for; None where the command line cannot say it.
        texts: The texts and how they were read; None where nothing was measured.
        defaults: Of the arguments of `compress`; what equals them is left out.
        format: Of the model.
        trust_remote_code: Whether the parent brings code.
    """
    parent, again = plan.model.name, f"{output}-again"
    trust = ["--trust-remote-code"] if trust_remote_code else []
    read: list[str] | None = []
    measured: list[str] | None = None
    if texts is not None and defaults is not None:
        measured = texts.words(defaults, ("--eval-data", texts.evaluation))
        given = ("--data", texts.calibration), ("--eval-data", texts.evaluation)
        read = texts.words(defaults, *given)
    made = trust if format == "mlx" else [*trust, "--format", format]
    start = ("moe-lens", "compress", parent)
    # With both texts: one that calibrated would be refused for measuring.
    apply = (*start, "--plan", "plan.json", *(read or ()), *made, "--output", f"../{again}")
    anew = None
    if read is not None and asked is not None and asked.plan is None:
        anew = (*start, *_asked(asked), *read, *made, "--output", again)
    # Unequal layers are read by code in the smaller model.
    both = ["--trust-remote-code"] if plan.per_layer else trust
    verify = None if measured is None else ("moe-lens", "verify", parent, ".", *measured, *both)
    return Commands(apply, anew, verify)


def _asked(asked: Asked) -> list[str]:
    found: list[str] = []
    for field in fields(asked):
        value = getattr(asked, field.name)
        if field.name in _NO_EFFECT or value is None or value is False:
            continue
        found.append(_option(_OWN_NAMES.get(field.name, field.name)))
        if value is not True:
            whole = isinstance(value, float) and value.is_integer()
            found.append(str(int(value) if whole else value))
    return found + ([] if asked.merging is None else _merging(asked.merging))


def _merging(merging: Merging) -> list[str]:
    found = ["--grouping", merging.grouping]
    if merging.grouping == "complete":
        shares = ",".join(f"{name}={share!r}" for name, share in merging.similarity.items())
        found += ["--similarity", shares]
    found += ["--merge-weights", merging.weights, "--align", merging.align]
    return [*found, "--router-rows", merging.router_rows]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
