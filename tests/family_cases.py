"""What the family suites share: a tiny model behind an ExpertRouter, and how to run it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from moe_lens.families import MoELayer
from moe_lens.instrument import Forward
from moe_lens.router import ExpertRouter
from tiny_models import CONFIGS, build, cpu_stand_ins

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "4bit": {"dtype": mx.bfloat16, "quantise": 4},
    "bfloat16": {"dtype": mx.bfloat16},
}
"""How the tiny models are built. Both half-precision modes compute in bfloat16, as on a GPU."""

TOLERANCE = {"float32": 1e-5, "4bit": 3e-2, "bfloat16": 3e-2}
"""Of sums in float32 against sums in the model's own type, relative to the largest value."""

ROWS = np.random.default_rng(0).integers(1, 126, (2, 40))
"""Two rows of 40 tokens."""

PROMPT, CONTINUATION = [1, 5, 9, 3, 7, 2, 8, 4, 6, 11, 33, 44, 55, 66, 77, 88], [3, 7, 100, 12]


@dataclass
class Case:
    """One tiny model in one mode."""

    name: str
    mode: str
    router: ExpertRouter = field(repr=False)

    @property
    def model(self) -> nn.Module:
        return self.router.model

    @property
    def layers(self) -> list[MoELayer]:
        return self.router.layers

    @property
    def model_type(self) -> str:
        """The module of mlx-lm that defines the block."""
        return self.layers[0].family.model_type

    @property
    def rows(self) -> np.ndarray:
        """[2, length] token ids: 64 expert rows and more, so that the sorted path is taken.

        The CPU's half-precision products are slow, so those modes get half of it.
        """
        return ROWS if self.mode == "float32" else ROWS[:, :20]

    @cached_property
    def plain(self) -> mx.array:
        """The logits of the untouched model."""
        return self.logits()

    def logits(self) -> mx.array:
        """The logits of `rows`, as the model is now."""
        output = self.model(mx.array(self.rows))
        mx.eval(output)
        return output

    def is_plain(self) -> bool:
        """Whether the model gives, bit for bit, what the untouched one gave."""
        return same(self.logits(), self.plain)

    def with_cache(self) -> list[mx.array]:
        """The logits of PROMPT, and of each token of CONTINUATION after it."""
        cache = make_prompt_cache(self.model)
        pieces = [PROMPT, *([token] for token in CONTINUATION)]
        outputs = [self.model(mx.array([piece]), cache=cache) for piece in pieces]
        mx.eval(outputs)
        return outputs

    def within(self, got: np.ndarray, wanted: np.ndarray) -> bool:
        """Whether two arrays agree to the rounding of this mode."""
        return bool(np.abs(got - wanted).max() <= TOLERANCE[self.mode] * np.abs(wanted).max())


def same(a: mx.array, b: mx.array) -> bool:
    """Whether two arrays are equal bit for bit and finite."""
    return bool(mx.array_equal(a, b)) and bool(mx.isfinite(b).all())


@contextlib.contextmanager
def open_case(name: str, mode: str) -> Iterator[Case]:
    """Builds the case; inside, half-precision experts run on a CPU.

    The router's own cast to float32 is left out, so that half precision is tested at all.
    """
    model, config = build(name, **MODES[mode])
    with contextlib.ExitStack() as stack:
        if mode != "float32":
            stack.enter_context(cpu_stand_ins.half_precision_experts())
            stack.enter_context(
                mock.patch("moe_lens.loaded_model.compute_in_float32", return_value=None)
            )
        case = Case(name, mode, ExpertRouter(model, None, config, name=name))
        assert bool(mx.isfinite(case.plain).all())
        yield case
        case.router.close()


def all_cases() -> list[tuple[str, str]]:
    """Every tiny model in every mode, all modes of a model together."""
    return [(name, mode) for name in CONFIGS for mode in MODES]


class Raw:
    """A sink that keeps values as the block had them: its own slot order and dtype."""

    def __init__(self, *values: str) -> None:
        self.values = frozenset(values)
        self.forwards: list[dict[tuple[str, int], mx.array]] = []

    def record(self, forward: Forward) -> None:
        kept = {
            (name, layer): forward.value(name, layer)
            for name in self.values
            for layer in forward.layers
        }
        mx.eval(list(kept.values()))
        self.forwards.append(kept)
