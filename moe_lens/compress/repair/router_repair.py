"""Router rows of a smaller model, trained a little so that it answers as its parent did.

Only the rows of the routers that ask for experts are trained; everything else is frozen. The loss
is KL(parent || smaller) of the next-token distributions on calibration text (Router-KD,
arXiv:2603.02217), the optimiser Adam (arXiv:1412.6980) with a learning rate that falls to 0 along
a cosine. What comes out is kept only if the loss on validation text, which trained nothing, is
smaller, measured on the model as it would be written: router in its own dtype and quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from moe_lens.bootstrap import Measure
from moe_lens.compress.choice.trials import Trial, TrialBench, lead
from moe_lens.compress.plan.plan import LayerPlan, Plan
from moe_lens.compress.plan.router_row import RouterRow
from moe_lens.compress.tensors.unpacked import unpack
from moe_lens.errors import UsageError
from moe_lens.families import STOCK
from moe_lens.telling import Progress

from .router_training import LEARNING_RATE, train, trained_rows

STEPS = 200


@dataclass(frozen=True)
class Repair:
    """What training the router rows of one plan did to the loss on validation text.

    `gain` is how much more the plan without them loses, prompt by prompt on the same text.
    """

    steps: int
    before: Measure
    after: Measure
    gain: Measure
    prompts: int
    tokens: int
    seed: int

    @property
    def kept(self) -> bool:
        """Whether the trained rows are used."""
        return self.gain.value > 0

    def text(self) -> str:
        """What happened, in one sentence."""
        how = (
            f"{self.steps} steps of training the router rows change the KL divergence on "
            f"{self.tokens} validation tokens of {self.prompts} prompts from {self.before} to "
            f"{self.after}"
        )
        if not self.kept:
            return f"{how}: no better, so the rows stay as they were"
        sure = self.gain.low is None or self.gain.low > 0
        return f"{how}: the trained rows are used" + (
            "" if sure else ", though the gain is within its error"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text(),
            "kept": self.kept,
            "steps": self.steps,
            "learning_rate": LEARNING_RATE,
            "seed": self.seed,
            "kl_before": self.before.to_dict(),
            "kl_after": self.after.to_dict(),
            "gain": self.gain.to_dict(),
        }


def repair_router(
    bench: TrialBench,
    plan: Plan,
    tokens: Sequence[Sequence[int]],
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Train the router rows of a plan, and keep them if that helps.

    Memory: the smaller model, and what a backward pass of `BATCH_TOKENS` tokens takes.

    Args:
        bench: With the parent and the validation text.
        plan: Any plan; its evidence gets ``router_repair``, whether the rows are kept or not.
        tokens: Text to train on, which is not the validation text.
        steps: Of Adam.
        seed: Of the order of the prompts.
        progress: Called with steps done and in all.

    Raises:
        UsageError: `steps` is below 1, or no prompt has two tokens.
        UnsupportedModelError: The model cannot be built in memory, or MLX gives no gradients for
            its router here; the message has the reason.
    """
    if steps < 1:
        raise UsageError(f"the router cannot be repaired in {steps} steps; give at least 1")
    child = bench.build(plan)
    child.cpu_experts = STOCK  # MLX cannot follow gradients through NumPy
    unpack(child.model, [layer.router for layer in child.layers])
    train(bench.router.forward, child, tokens, steps=steps, seed=seed, progress=progress)
    rows = {layer.index: trained_rows(layer) for layer in child.layers}
    child.close()
    del child
    mx.clear_cache()
    trained = with_rows(plan, rows)
    before = bench.try_plan("before", plan, built=True)[0]
    after = bench.try_plan("after", trained)[0]
    found = _repair(steps, before, after, seed)
    best = trained if found.kept else plan
    return replace(best, evidence={**best.evidence, "router_repair": found.to_dict()})


def _repair(steps: int, before: Trial, after: Trial, seed: int) -> Repair:
    return Repair(
        steps=steps,
        before=before.loss.kl,
        after=after.loss.kl,
        gain=lead(after, before, seed),
        prompts=before.loss.prompts,
        tokens=before.loss.tokens,
        seed=seed,
    )


def with_rows(plan: Plan, rows: dict[int, list[RouterRow]]) -> Plan:
    """The plan with these router rows; what corrects the selection of a group stays."""

    def changed(layer: LayerPlan) -> LayerPlan:
        groups = []
        for group, row in zip(layer.groups, rows[layer.layer], strict=True):
            old = group.router_row
            kept = old.selection_bias if isinstance(old, RouterRow) else None
            groups.append(replace(group, router_row=replace(row, selection_bias=kept)))
        return replace(layer, groups=tuple(groups))

    return replace(plan, layers=tuple(changed(layer) for layer in plan.layers))
