"""What `compress` and `write` are asked for, as the requests that a stopped run is known by."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from moe_lens.checkpoint_files.unchanged import FolderState
from moe_lens.corpus import Corpus
from moe_lens.fingerprint import canonical_sha256, tokenizer_sha256

from .choice.asked import Asked
from .merging.merging import Merging
from .plan.identity import public_name
from .plan.plan import Plan
from .plan.plan_json import read_plan
from .resuming.request import Fact, Request, computed_by

_WITHOUT_EFFECT = ("statistics_file",)
"""Fields of `Asked` that change no byte."""

_OWN_NAMES = {"repair_steps": "--repair-router", "merging": "the choices of the merge"}


def compression_request(
    name: str | Path,
    source: FolderState,
    asked: Asked,
    texts: tuple[Corpus, Corpus],
    reading: dict[str, Fact],
) -> Request:
    """The request of `compress`.

    Args:
        name: The model as it was named; its last part stands in the plan.
        source: The folder of the model.
        asked: What shall become of it.
        texts: That calibrate and that measure.
        reading: Arguments of `compress` that say how it runs, as far as they decide a byte.

    Raises:
        UsageError: There is no plan where one was named, or it does not add up.
    """
    facts: dict[str, Fact] = {}
    for field in fields(asked):
        if field.name not in _WITHOUT_EFFECT:
            name_of_it = _OWN_NAMES.get(field.name) or _option(field.name)
            value = getattr(asked, field.name)
            given = Path(value) if field.name == "plan" and isinstance(value, str) else value
            facts[name_of_it] = _plain(given)
    facts |= {_option(key): value for key, value in reading.items()}
    for option, text in zip(("--data", "--eval-data"), texts, strict=True):
        facts[f"the text of {option}"] = text.fingerprint
    return Request(_source(name, source) | facts | computed_by())


def writing_request(
    name: str | Path, source: FolderState, plan: Plan, settings: dict[str, Fact]
) -> Request:
    """The request of `write`; `settings` are its arguments that decide a byte."""
    facts = {_option("plan"): _plain(plan), **settings}
    return Request(_source(name, source) | facts | computed_by())


def _source(name: str | Path, source: FolderState) -> dict[str, Fact]:
    return {
        "the name of the model": public_name(name),
        "the config of the model": source.config_sha256,
        "the weights of the model": source.weights_sha256,
        "the tokenizer of the model": tokenizer_sha256(source.folder),
    }


def _plain(value: object) -> Fact:
    """Plain values as they are, plans (an argument that is a path is one) and merges as hashes."""
    if isinstance(value, Path):
        value = read_plan(value)
    if isinstance(value, Plan):
        return canonical_sha256(value.to_dict())
    if isinstance(value, Merging):
        return canonical_sha256(value.settings())
    return value if isinstance(value, Fact) else str(value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
