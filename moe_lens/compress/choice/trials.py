"""Plans tried before one is written: the loss of each on the same text, against the same parent.

A plan that removes experts is masks in the live parent. One that makes new tensors (a merge,
narrower experts in a quantised model) is built in memory by stock mlx-lm, rounding included,
where that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moe_lens.bootstrap import Bootstrap, Measure
from moe_lens.compress.checkpoint.in_memory import in_memory
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.resuming.work_folder import WorkFolder
from moe_lens.compress.tensors.size_table import Shape, SizeTable
from moe_lens.compress.tensors.unpacked import run_fastest
from moe_lens.compress.verification.losses import Comparison, Forwards, compare, with_k
from moe_lens.compress.verification.verification import Loss
from moe_lens.compress.verification.verify import loss
from moe_lens.errors import CaptureError, UnsupportedModelError
from moe_lens.streaming import Batch, Passed
from moe_lens.streaming.memory import free_memory
from moe_lens.telling import Progress

from .kept_trials import KeptTrials
from .simulate import simulated

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


KEPT_BYTES = 1 << 30
"""The parent's logits on the text are kept up to here; beyond, each trial runs the parent too."""

MEMORY_SHARE = 0.5
"""Of the available memory that a smaller model built for a trial may take."""


@dataclass(frozen=True)
class Trial:
    """One plan and what it lost.

    `name` is what tables call its method; `shape` and `bytes` what the model would be, `bytes` of
    its weight files.
    """

    name: str
    plan: Plan
    shape: Shape
    bytes: int
    loss: Loss
    kl: NDArray[np.float64]
    """[positions] the KL divergence of each."""
    nll: NDArray[np.float64]
    """[positions] the negative log-likelihood of each token after it, by the smaller model."""
    prompt: NDArray[np.int64]
    """[positions] which prompt each is of."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the plan."""
        return {
            "method": self.name,
            "num_experts": self.shape.num_experts,
            "expert_width": self.shape.expert_width,
            "experts_per_token": self.plan.experts_per_token,
            "bytes": self.bytes,
            "kl": self.loss.kl.to_dict(),
            "perplexity": self.loss.perplexity_after.to_dict(),
            "perplexity_ratio": self.loss.perplexity_ratio.to_dict(),
            "top1_agreement": self.loss.top1_agreement.to_dict(),
        }


@dataclass(frozen=True)
class Skipped:
    """A method that was not tried, and why."""

    name: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"method": self.name, "reason": self.reason}


def lead(best: Trial, other: Trial, seed: int = 0) -> Measure:
    """How much more `other` loses than `best`: difference of the mean KL, over the same prompts."""
    return Bootstrap(best.prompt, seed=seed).measure(other.kl - best.kl)


class TrialBench:
    """Runs plans of one model on one text.

    Args:
        router: The parent, as it runs fastest (`fastest`).
        tokens: The text; prompts of fewer than two tokens count nothing.
        table: Of the parent.
        work: Where what was measured is kept, and found again; None: nowhere.
        seed: Of the bootstrap.

    Raises:
        CaptureError: No prompt has two tokens.
    """

    def __init__(
        self,
        router: ExpertRouter,
        tokens: Sequence[Sequence[int]],
        table: SizeTable,
        work: WorkFolder | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if not any(len(ids) > 1 for ids in tokens):
            raise CaptureError(
                "no prompt of the text that would choose has two tokens, so there is nothing to "
                "predict; give longer text"
            )
        self.router, self.tokens, self.table, self.seed = router, tokens, table, seed
        size = 4 * router.vocabulary * sum(map(len, tokens))
        self._kept = KeptTrials(work, tokens, [router.cpu_experts])
        self._parent: Forwards = router.forwards if size > KEPT_BYTES else _Kept(router.forwards)

    def try_plan(
        self,
        name: str,
        plan: Plan,
        ks: Sequence[int] = (),
        progress: Progress | None = None,
        *,
        built: bool = False,
    ) -> list[Trial]:
        """The loss of a plan.

        Args:
            name: What tables call it.
            plan: The plan.
            ks: Experts per token to try it with; none for its own.
            progress: Called with tokens done and in all.
            built: Build it even if masks could show it.

        Raises:
            UnsupportedModelError: It must be built to be tried, and does not fit into memory or
                brings code of its own.
        """
        plans = [plan.with_experts_per_token(k) for k in ks] or [plan]
        found = self._measured(plans, progress, built=built)
        return [
            self._trial(name, each, comparison)
            for each, comparison in zip(plans, found, strict=True)
        ]

    def mean_kl(self, plan: Plan) -> float:
        """The mean KL divergence of a plan that masks can show, and nothing else of it."""
        return float(self._measured([plan])[0].kl.mean())

    def _measured(
        self, plans: Sequence[Plan], progress: Progress | None = None, *, built: bool = False
    ) -> list[Comparison]:
        def measure() -> list[Comparison]:
            with self._forwards(plans, built=built) as forwards:
                return compare(
                    self._parent,
                    forwards,
                    self.tokens,
                    self.router.vocabulary,
                    progress,
                    wave_tokens=self.router.wave_tokens,
                )

        return self._kept.once(plans, built, measure, progress)

    def _trial(self, name: str, plan: Plan, found: Comparison) -> Trial:
        shape = shape_of(plan)
        return Trial(
            name=name,
            plan=plan,
            shape=shape,
            bytes=self.table.of_counts(plan.counts) if plan.per_layer else self.table.bytes(shape),
            loss=loss(found, seed=self.seed),
            kl=found.kl,
            nll=found.nll_after,
            prompt=found.prompt,
        )

    @contextmanager
    def _forwards(self, plans: Sequence[Plan], *, built: bool) -> Iterator[list[Forwards]]:
        if not built and not self._must_build(plans[0]):
            yield [_masked(self.router, plan) for plan in plans]
            return
        child = self.build(max(plans, key=lambda plan: plan.experts_per_token))
        try:
            yield [with_k(child, plan.experts_per_token) for plan in plans]
        finally:
            child.close()
            del child
            mx.clear_cache()

    def build(self, plan: Plan) -> ExpertRouter:
        """The smaller model in memory, as it runs fastest.

        Raises:
            UnsupportedModelError: It does not fit, or brings code of its own.
        """
        size = self.table.bytes(shape_of(plan))
        free = free_memory()
        if not self.router.streamed and free is not None and size > MEMORY_SHARE * free:
            raise UnsupportedModelError(
                f"it must be built to be tried, which takes {size / 1e9:.2f} GB of the "
                f"{free / 1e9:.2f} GB of memory that are free"
            )
        child = in_memory(self.router, plan)
        run_fastest(child, self.router.cpu_experts)
        return child

    def _must_build(self, plan: Plan) -> bool:
        rows = any(group.router_row is not None for each in plan.layers for group in each.groups)
        if plan.kind == "merge" or rows:
            return True
        return plan.expert_width is not None and bool(self.table.scales)


def shape_of(plan: Plan) -> Shape:
    """The numbers of a plan that decide its size; of unequal layers the most experts."""
    return Shape(plan.num_experts, plan.expert_width or plan.model.expert_width)


def _masked(router: ExpertRouter, plan: Plan) -> Forwards:
    def forwards(batches: Sequence[Batch], passed: Passed | None) -> Sequence[mx.array]:
        with simulated(router, plan):
            return router.forwards(batches, passed)

    return forwards


class _Kept:
    """Forwards that answer a second time from memory."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards
        self._known: dict[tuple[Any, ...], mx.array] = {}

    def __call__(self, batches: Sequence[Batch], passed: Passed | None) -> list[mx.array]:
        new = [batch for batch in batches if _key(batch) not in self._known]
        for batch, logits in zip(new, self._forwards(new, passed) if new else [], strict=True):
            mx.eval(logits)
            self._known[_key(batch)] = logits
        return [self._known[_key(batch)] for batch in batches]


def _key(batch: Batch) -> tuple[Any, ...]:
    return batch.ids.shape, batch.ids.tobytes()
