"""What ``moe-lens vocab`` is asked for, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from moe_lens.errors import UsageError

if TYPE_CHECKING:
    from moe_lens import ExpertRouter
    from moe_lens.instrument import Sink
    from moe_lens.trace import TokenTexts


class By(StrEnum):
    """Which side of an expert is shown."""

    ROUTING = "routing"
    CONTRIBUTION = "contribution"
    BOTH = "both"


class Read(StrEnum):
    """How what an expert adds to the stream is read."""

    EFFECT = "effect"
    ALONE = "alone"


class Ids(StrEnum):
    """Which token id is counted."""

    INPUT = "input"
    NEXT = "next"
    PREDICTED = "predicted"


@dataclass(frozen=True)
class Wanted:
    """What is to be shown.

    Raises:
        UsageError: Options that contradict each other.
    """

    by: By | None
    read: Read
    ids: Ids
    choices: int
    fewest: int
    top: int
    layer: int | None
    expert: tuple[int, int] | None
    directions: int
    token: str | None
    seed: int

    def __post_init__(self) -> None:
        views = {"--layer": self.layer, "--expert": self.expert, "--token": self.token}
        given = [name for name, value in views.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} show different things: give one of them")
        if self.directions and self.by is By.ROUTING:
            raise UsageError("--directions are what an expert pushes: leave out --by routing")
        if self.directions and self.expert is None:
            raise UsageError(
                "--directions belong to one expert: name it with --expert LAYER:EXPERT"
            )

    @property
    def alone(self) -> bool:
        """Whether one expert or token is shown."""
        return self.expert is not None or self.token is not None

    def check_run(self) -> None:
        """Refuse of a run what needs the model."""
        if self.by in (By.CONTRIBUTION, By.BOTH):
            raise UsageError(
                "what experts push is not in a recorded run: give the model instead of the run, "
                "or show --by routing"
            )
        if self.directions:
            raise UsageError("--directions read the weights: give the model instead of the run")

    def check(self, router: ExpertRouter) -> list[Sink]:
        """Refuse what this model does not have, before it runs; nothing more is watched."""
        from moe_lens.analysis.vocabulary import token_of
        from moe_lens.trace import place_of

        layer = self.layer if self.expert is None else self.expert[0]
        if layer is not None:
            place_of(router.info.moe_layers, layer)
        if self.expert is not None and self.expert[1] >= router.info.router_width:
            raise UsageError(
                f"layer {layer} has the experts 0 to {router.info.router_width - 1}; "
                f"{self.expert[1]} is none of them"
            )
        if self.token is not None:
            token_of(self.token, all_texts(router))
        return []


def all_texts(router: ExpertRouter) -> TokenTexts:
    """The texts of the whole vocabulary."""
    from moe_lens.trace import TokenTexts

    return TokenTexts.from_tokenizer(router.tokenizer, router.tokenizer.get_vocab().values())
