"""What a smaller model shall be and how its plan is found, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lens.compress.checkpoint.expert_width import check_asked_width
from moe_lens.compress.merging.merging import Merging
from moe_lens.compress.merging.stage import check_merge
from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.statistics.blending import Blend
from moe_lens.compress.statistics.saliency import METHODS
from moe_lens.corpus import Corpus
from moe_lens.errors import UsageError

from .asked_size import AskedSize
from .choice import AUTO
from .methods import CHANNELS

ONE_METHOD = "reap"
"""What removes experts where one method must be named and none is."""


@dataclass(frozen=True)
class Asked:
    """The arguments of `compress` that decide the plan; that is where they are described."""

    threshold: float | None = None
    ratio: float | None = None
    experts: int | None = None
    target_gb: float | None = None
    expert_width: float | None = None
    merge: bool = False
    merging: Merging | None = None
    method: str | None = None
    plan: Plan | str | Path | None = None
    experts_per_token: int | None = None
    blend: str | None = None
    protect: bool = False
    statistics_file: str | Path | None = None
    stop_at: float | None = None
    repair_steps: int | None = None
    per_layer: bool = False

    @property
    def size(self) -> AskedSize | None:
        """How small, where that is said by experts or bytes."""
        if self.ratio is None and self.experts is None and self.target_gb is None:
            return None
        return AskedSize(self.ratio, self.experts, self.target_gb)

    @property
    def decided_method(self) -> str:
        """The method that was named, or what stands for none."""
        if self.method is not None:
            return self.method
        one = self.blend is not None or self.protect or self.expert_width is not None or self.merge
        one = one or self.per_layer
        return ONE_METHOD if one or self.size is None else AUTO

    @property
    def chooses(self) -> bool:
        """Whether all methods are tried."""
        return self.plan is None and self.size is not None and self.decided_method == AUTO

    @property
    def may_change_experts(self) -> bool:
        """Whether an expert may get weights that none of the parent's has.

        Of a plan that is given that is not known yet; it is applied soon enough.
        """
        if self.plan is not None:
            return False
        if self.threshold is not None or self.merge or self.expert_width is not None:
            return True
        return self.decided_method in (AUTO, CHANNELS)

    @property
    def validates(self) -> bool:
        """Whether a part of the calibration text is kept for comparing."""
        compared = self.per_layer and self.threshold is None
        return self.chooses or self.repair_steps is not None or compared

    def check(self) -> None:
        """Raise UsageError where arguments contradict each other or are out of range."""
        self._check_numbers()
        if self.plan is not None:
            self._check_plan()
            return
        self._check_size()
        self._check_method()
        self._check_choice()
        self._check_per_layer()
        check_merge(
            self.merging,
            self.threshold,
            merge=self.merge,
            sized=self.size is not None,
            narrower=self.expert_width is not None,
        )

    def check_text(self, learn: Corpus) -> None:
        """Raise UsageError unless the blend suits the text."""
        if self.blend is not None:
            labels = {prompt.label or "" for prompt in learn.prompts}
            Blend.parse(self.blend).check(tuple(sorted(labels)))

    def _check_numbers(self) -> None:
        if self.expert_width is not None:
            check_asked_width(self.expert_width)
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise UsageError(
                f"the threshold is {self.threshold:g}; it must be above 0 and at most 1"
            )
        k = self.experts_per_token
        if k is not None and k < 1:
            raise UsageError(f"the experts per token are {k}; a token needs at least 1")
        steps = self.repair_steps
        if steps is not None and steps < 1:
            raise UsageError(f"the router cannot be repaired in {steps} steps; give at least 1")

    def _check_plan(self) -> None:
        given = {
            "--threshold": self.threshold,
            "--ratio": self.ratio,
            "--experts": self.experts,
            "--target-gb": self.target_gb,
            "--expert-width": self.expert_width,
            "--merge": self.merge or None,
            "--method": self.method,
            "--experts-per-token": self.experts_per_token,
            "--blend": self.blend,
            "--protect": self.protect or None,
            "--statistics": self.statistics_file,
            "--stop-at": self.stop_at,
            "--per-layer": self.per_layer or None,
            "choices of a merge": self.merging,
        }
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise UsageError(
                f"a plan (--plan) says all there is to say: leave {', '.join(extra)} out, or edit "
                "the plan"
            )

    def _check_size(self) -> None:
        size = self.size  # raises for two ways to say it, and for numbers out of range
        sized = size is not None or self.expert_width is not None
        if self.threshold is not None and sized:
            raise UsageError(
                "give either a threshold (--threshold), which finds how many experts stay, or a "
                "size (--ratio, --experts, --target-gb, --expert-width)"
            )
        if self.threshold is None and not sized:
            raise UsageError(
                "say how small the model shall be: --ratio 0.25 (a quarter of the experts less), "
                "--experts 96 (of each layer), --target-gb 20 (all weight files), --expert-width "
                "0.5 (half of the channels inside each expert), or --threshold 0.8 alone (merge "
                "what is so similar); or give a plan (--plan FILE)"
            )

    def _check_method(self) -> None:
        known = (AUTO, *METHODS, CHANNELS)
        if self.method is not None and self.method not in known:
            raise UsageError(
                f"there is no method {self.method!r}; choose one of {', '.join(known)}"
            )
        if self.method is not None and (self.size is None or self.merge):
            raise UsageError(
                "a method (--method) removes experts or channels: it belongs to --ratio, --experts "
                "or --target-gb; how experts are merged is said with --grouping"
            )
        if self.expert_width is not None and self.method in (AUTO, CHANNELS):
            raise UsageError(
                f"--method {self.method} finds the width of the experts itself: leave "
                "--expert-width out, or name what removes experts (--method reap)"
            )

    def _check_choice(self) -> None:
        """Refuse options of a choice that is not made."""
        chosen = (self.blend is not None, self.protect)
        if any(chosen) and (self.size is None or self.method in (AUTO, CHANNELS)):
            raise UsageError(
                "a blend (--blend) and --protect choose which experts go: give a size such as "
                "--ratio 0.25, and a method that removes experts (--method reap)"
            )
        if self.merge and any(chosen):
            raise UsageError(
                "a blend and the protection of super experts judge what is removed; a merge keeps "
                "something of every expert: leave them out"
            )
        nothing_kept = self.threshold is None and (self.size is None or self.method == CHANNELS)
        if nothing_kept and (self.statistics_file or self.stop_at):
            raise UsageError(
                "--statistics and --stop-at belong to --threshold, --ratio, --experts and "
                "--target-gb; channels are calibrated on all of the text, each time"
            )

    def _check_per_layer(self) -> None:
        if not self.per_layer or self.threshold is not None:
            return
        if self.size is None or self.merge or self.method in (AUTO, CHANNELS):
            raise UsageError(
                "numbers of experts of each layer's own (--per-layer) are found where one method "
                "removes experts, or by a threshold: give a size such as --ratio 0.25, and no "
                "method or one such as --method reap; or --threshold 0.8"
            )
        if self.expert_width is not None:
            raise UsageError(
                "--per-layer shares bytes out among whole experts: leave --expert-width out"
            )

    def settings(self) -> dict[str, Any]:
        """What was asked for of the size, as plain values for a plan."""
        size = self.size
        return {} if size is None else size.to_dict()
