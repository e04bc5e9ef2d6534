"""The result of a verification: numbers with their uncertainty, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .bootstrap import Measure
from .identity import CorpusIdentity
from .json_text import dump
from .size import Size

MAX_RISE = 0.10
"""Rise of the perplexity from which the loss is called large."""

MAX_KL = 0.10
"""Mean KL divergence, in nats per token, from which the loss is called large.

By Pinsker's inequality the two next-token distributions then may differ by up to sqrt(KL / 2) =
0.22 in total variation: sampling from both, up to about one token in five comes out differently.
Quantising a model to 4 bits costs a few hundredths; beyond 1 nat mlx-optiq calls a pruned model
not fit to publish.
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
    "speed": (
        "prompt tokens per second of a whole forward, both models in turn on the same batches in "
        "one process; the ratio is after / before"
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


@dataclass(frozen=True)
class Speed:
    """Tokens per second before and after."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After / before: above 1 the smaller model is faster."""
        return self.after / self.before


@dataclass(frozen=True)
class Verification:
    """Two models compared on text that did not calibrate; see `definitions`."""

    original: str
    compressed: str
    corpus: CorpusIdentity
    loss: Loss
    labels: tuple[LabelLoss, ...]
    size_before: Size
    size_after: Size
    speed: Speed
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
        return tuple(found)

    def summary(self) -> str:
        """One line for people."""
        loss = self.loss
        return (
            f"perplexity {loss.perplexity_before} -> {loss.perplexity_after} ({loss.change()}), "
            f"KL {loss.kl} nats per token, same first choice on {loss.top1_agreement.value:.1%} "
            f"of {loss.tokens} held-out tokens; {self.size_before.bytes / 1e6:.2f} -> "
            f"{self.size_after.bytes / 1e6:.2f} MB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
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
            "tokens_per_second": {
                "before": self.speed.before,
                "after": self.speed.after,
                "ratio": self.speed.ratio,
            },
            "device": self.device,
            "warnings": list(self.warnings),
            "definitions": dict(DEFINITIONS),
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return dump(self.to_dict())

    def _repr_html_(self) -> str:
        from .report import verification_html

        return verification_html(self)
