"""The result of a verification: numbers with their uncertainty, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_lens.bootstrap import Measure
from moe_lens.compress.plan.identity import CorpusIdentity
from moe_lens.compress.plan.json_text import dump, finite
from moe_lens.compress.tensors.size import Size
from moe_lens.errors import MoeLensError, UsageError

from .repetition import NEW_TOKENS
from .routing_drift import RoutingDrift
from .stock_load import TOLERANCE, StockLoad
from .use import Use

MAX_RISE = 0.10
"""Rise of the perplexity from which the loss is called large."""

MAX_KL = 0.10
"""Mean KL divergence, in nats per token, from which the loss is called large.

By Pinsker's inequality the two next-token distributions then may differ by up to sqrt(KL / 2) =
0.22 in total variation: sampling from both, up to about one token in five comes out differently.
Quantising a model to 4 bits costs a few hundredths; beyond 1 nat mlx-optiq calls a pruned model
not fit to publish.
"""

MAX_REPETITION_RISE = 0.10
"""Rise of the share of repeated 4-grams from which generated text is called repetitive.

The interval of the change must lie above 0 as well: with a few short texts a single loop moves
the mean by several percent.
"""

DEFINITIONS = {
    "perplexity": (
        "exp of the mean negative log-likelihood of every token given those before it in its "
        "prompt (the first token of a prompt is not predicted)"
    ),
    "kl": (
        "KL(original || compressed) of the next-token distributions over the whole vocabulary, "
        "nats, mean over the same positions; kl_99 is the 99th percentile over positions"
    ),
    "top1_agreement": "share of the positions where both models have the same likeliest token",
    "uncertainty": (
        "standard error and 95 % interval from 1000 bootstrap samples of the prompts, the same "
        "samples for both models; with few prompts the interval is narrower than it should be"
    ),
    "routing_drift": (
        "mean over tokens of the total variation distance between the parent's expert weights, "
        "pushed through the map from its experts to the smaller model's and normalised, and the "
        "smaller model's normalised weights: the share of the routing weight that goes elsewhere, "
        "0 to 1; removed is the part of it that the parent gave to removed experts"
    ),
    "repetition": (
        "share of repeated 4-grams, 1 - different / all (seq-rep-4, arXiv 1908.04319), in greedy "
        f"continuations of at most {NEW_TOKENS} tokens of the beginnings of held-out prompts; "
        "mean over prompts, the change is after - before prompt by prompt"
    ),
    "speed": (
        "prompt tokens per second of a whole forward, both models in turn on the same batches in "
        "one process, routing recorded in both; written tokens per second are those of "
        "mlx_lm.stream_generate, one text at a time; the ratio is after / before"
    ),
    "memory": (
        "bytes a forward takes: the weights as they lie in memory here, and the most that MLX had "
        "in use beyond what was in use before the forward (mx.get_peak_memory), over batches of "
        "at most 2048 tokens or one longer prompt; without MLX's cache of freed buffers"
    ),
    "stock_load": (
        "largest absolute difference between the logits of the folder as mlx_lm.load opens it and "
        "those of the live model, on the first tokens of the held-out text; beyond "
        f"{TOLERANCE:g} of the largest logit it is an error"
    ),
    "bytes": "of all tensors as stored, without tokenizer and config",
    "parameters": "number of weights, packed ones counted one by one",
}


@dataclass(frozen=True)
class Loss:
    """What changed on one set of tokens."""

    prompts: int
    tokens: int
    perplexity_before: Measure
    perplexity_after: Measure
    perplexity_ratio: Measure
    kl: Measure
    kl_99: float
    top1_agreement: Measure

    def change(self) -> str:
        """The change of the perplexity in percent; prompts pair up, so its error is small."""
        ratio = self.perplexity_ratio
        error = "" if ratio.standard_error is None else f" ± {ratio.standard_error:.2%}"
        return f"{ratio.value - 1:+.2%}{error}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            name: value.to_dict() if isinstance(value, Measure) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class LabelLoss:
    """What changed on the prompts of one label."""

    label: str
    loss: Loss


class LossTooLargeError(MoeLensError):
    """The smaller model lost more than was allowed. Carries the `verification` that found it."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification

    @property
    def evidence(self) -> dict[str, Any]:
        """The verification as plain values for JSON."""
        return self.verification.to_dict()


def check_max_kl(max_kl: float | None) -> None:
    """Raise UsageError unless `max_kl` is None or a divergence can lie below it."""
    if max_kl is not None and not max_kl >= 0.0:
        raise UsageError(
            f"the largest KL divergence is {max_kl:g}; give nats per token, at least 0 "
            "(--max-kl 0.1)"
        )


@dataclass(frozen=True)
class Verification:
    """Two models compared on text that did not calibrate; see `definitions`.

    `stock_load` is None where the smaller model was given in memory and stands in no folder, `use`
    where one of the two was streamed: nobody uses a model like that.
    """

    original: str
    compressed: str
    corpus: CorpusIdentity
    loss: Loss
    labels: tuple[LabelLoss, ...]
    size_before: Size
    size_after: Size
    use: Use | None
    drift: RoutingDrift
    stock_load: StockLoad | None
    device: str

    definitions = DEFINITIONS

    @property
    def definition(self) -> str:
        """What the numbers mean, as one text."""
        return "; ".join(f"{name}: {text}" for name, text in DEFINITIONS.items())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before using the smaller model; empty when the loss is small."""
        found = []
        ratio, kl = self.loss.perplexity_ratio.value, self.loss.kl.value
        if not ratio <= 1 + MAX_RISE:
            found.append(
                f"the loss is large: perplexity is {ratio - 1:+.0%} on held-out text (more than "
                f"{MAX_RISE:.0%}); remove fewer experts or calibrate on text like yours"
            )
        if not kl <= MAX_KL:
            found.append(
                f"the loss is large: KL divergence is {kl:.3g} nats per token (more than "
                f"{MAX_KL:g}), so up to {min(1.0, (kl / 2) ** 0.5):.0%} of sampled tokens may "
                "come out differently"
            )
        if self.use is not None and self.use.repetition.rises(MAX_REPETITION_RISE):
            text = self.use.repetition
            found.append(
                f"generated text repeats itself: {text.after.value:.0%} of its 4-grams "
                f"are repeated, {text.before.value:.0%} before; remove fewer experts "
                "or calibrate on text like yours"
            )
        return tuple(found)

    def check(self, max_kl: float | None) -> None:
        """The gate: nothing happens unless the mean KL divergence is above `max_kl`.

        The mean decides, not its interval, so that the same two models always pass or fail.

        Raises:
            LossTooLargeError: It is above, or no number at all.
        """
        kl = self.loss.kl
        if max_kl is None or kl.value <= max_kl:
            return
        raise LossTooLargeError(
            f"the KL divergence of {self.compressed} from {self.original} is {kl} nats per token, "
            f"more than the {max_kl:g} that --max-kl allows",
            self,
        )

    def summary(self) -> str:
        """One line for people."""
        loss, mean = self.loss, self.drift.mean
        drift = "" if mean is None else f", {mean.value:.1%} of the routing weight elsewhere"
        return (
            f"perplexity {loss.perplexity_before} -> {loss.perplexity_after} ({loss.change()}), "
            f"KL {loss.kl} nats per token, same first choice on {loss.top1_agreement.value:.1%} "
            f"of {loss.tokens} held-out tokens{drift}; {self.size_before.bytes / 1e6:.2f} -> "
            f"{self.size_after.bytes / 1e6:.2f} MB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where a number is not finite."""
        plain: dict[str, Any] = {
            "original": self.original,
            "compressed": self.compressed,
            "corpus": self.corpus.to_dict(),
            "loss": self.loss.to_dict(),
            "labels": {each.label: each.loss.to_dict() for each in self.labels},
            "bytes": {"before": self.size_before.bytes, "after": self.size_after.bytes},
            "parameters": {
                "before": self.size_before.parameters,
                "after": self.size_after.parameters,
            },
            "tokens_per_second": None
            if self.use is None
            else {"read": self.use.reading.to_dict(), "written": self.use.writing.to_dict()},
            "routing_drift": self.drift.to_dict(),
            "repetition": None if self.use is None else self.use.repetition.to_dict(),
            "memory": None if self.use is None else self.use.memory.to_dict(),
            "stock_load": None if self.stock_load is None else self.stock_load.to_dict(),
            "device": self.device,
            "warnings": list(self.warnings),
            "definitions": dict(DEFINITIONS),
        }
        safe: dict[str, Any] = finite(plain)
        return safe

    def to_json(self) -> str:
        """Indented JSON."""
        return dump(self.to_dict())

    def _repr_html_(self) -> str:
        from moe_lens.compress.report.report import verification_html

        return verification_html(self)
