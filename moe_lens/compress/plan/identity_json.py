"""Reading from JSON what a plan or a statistics file remembers of its model and its text."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .identity import CorpusIdentity, ModelIdentity

_MOST = 1 << 20
"""More experts of a layer, or channels of an expert, than any model has."""

Identity = TypeVar("Identity", ModelIdentity, CorpusIdentity)


def read_identity(cls: type[Identity], content: dict[str, Any]) -> Identity:
    """What `to_dict` of the class gave.

    Raises:
        ValueError: Something is missing, of the wrong kind, or describes no possible model; the
            message is the end of a sentence about it.
    """
    try:
        found = cls(**content)
    except TypeError as error:
        raise ValueError(f"is incomplete: {error}") from error
    for name, kind in get_type_hints(cls).items():
        value = getattr(found, name)
        negative = type(value) is int and value < 0 and name != "seed"
        if negative or not _is_of(value, kind):
            text = ascii(value)
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise ValueError(f'has the "{name}" {shown}, which cannot be')
    if isinstance(found, ModelIdentity):
        _check_model(found)
    return found


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    return type(value) in (get_args(kind) if get_origin(kind) is UnionType else (kind,))


def _check_model(model: ModelIdentity) -> None:
    groups = model.group_count
    if (
        not 0 < model.num_experts <= model.router_width <= _MOST
        or model.expert_width > _MOST
        or not 0 < model.experts_per_token <= model.router_width
        or groups < 1
        or model.num_experts % groups
        or not 0 < model.group_keep <= groups
    ):
        raise ValueError(
            f"describes no possible model ({model.num_experts} experts of {model.expert_width} "
            f"channels, {model.experts_per_token} for each token, in {groups} groups)"
        )
