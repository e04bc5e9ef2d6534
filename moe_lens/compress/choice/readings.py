"""All that the methods learn from one calibration text, read once and shared among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.compress.calibration.channel_calibration import calibrate_channels
from moe_lens.compress.calibration.layer_sample import LayerSample, sample_layers, sample_reason
from moe_lens.compress.calibration.statistics_reuse import calibrate_once
from moe_lens.compress.checkpoint.expert_width import Widths, widths_of
from moe_lens.compress.statistics.channel_statistics import ChannelCalibration
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.compress.telling import Say, StageProgress, of_stage
from moe_lens.compress.tensors.unpacked import unpacked
from moe_lens.corpus import Corpus
from moe_lens.errors import MoeLensError, UnsupportedModelError

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


SAMPLE_VALUES = ("expert_inputs", "router_logits", "mask")
"""What a layer must show, and take, for methods that judge on a sample."""

STAGES = ("calibrating", "calibrating channels", "sampling layers")


@dataclass(frozen=True)
class Readings:
    """What one text says about one model.

    Where something cannot be read, it is None and its `no_...` says why.
    """

    router: ExpertRouter
    """The parent as it runs fastest (`unpacked`)."""
    tokens: Sequence[Sequence[int]]
    statistics: Calibration
    channels: ChannelCalibration | None
    widths: Widths | None
    no_channels: str | None
    samples: Sequence[LayerSample] | None
    no_samples: str | None
    router_inputs: bool
    """Whether the samples hold what the routers read."""


def read_all(
    router: ExpertRouter,
    corpus: Corpus,
    *,
    sequence_length: int | None = 512,
    chat_template: bool = False,
    statistics_file: Path | None = None,
    stop_at: float | None = None,
    seed: int = 0,
    progress: StageProgress | None = None,
    say: Say | None = None,
) -> Readings:
    """Run the text through the model, for every method that it can serve.

    Three passes: the routed sums with the similarities, the channels, and the sample of at most
    8192 tokens' worth of prompts.

    Args:
        router: The parent.
        corpus: The text.
        sequence_length: Tokens after which a prompt is cut.
        chat_template: Render prompts through the tokenizer's chat template.
        statistics_file: Where the routed sums are kept and read again; None: nowhere.
        stop_at: As in `calibrate`.
        seed: Of the samples.
        progress: Called with one of `STAGES`, tokens done and in all.
        say: Told whether the file was used or written.

    Raises:
        UnsupportedModelError, CaptureError, MoeLensError: As `calibrate`.
    """
    packed, router = router, unpacked(router)
    statistics = calibrate_once(
        router,
        corpus,
        statistics_file,
        similarity=True,
        sequence_length=sequence_length,
        chat_template=chat_template,
        stop_at=stop_at,
        seed=seed,
        progress=of_stage(progress, STAGES[0]),
        say=say,
    )
    tokens = corpus.tokenize(router.tokenizer, sequence_length, chat_template)
    channels, widths, no_channels = None, None, None
    try:
        widths = widths_of(packed.config, packed.layers)
        if not widths.possible:
            raise UnsupportedModelError("no smaller width can be stored as whole groups")
        channels = calibrate_channels(
            router,
            corpus,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
            progress=of_stage(progress, STAGES[1]),
        )
    except MoeLensError as error:
        no_channels = str(error)
    samples, no_samples = None, sample_reason(router.layers, SAMPLE_VALUES)
    inputs = no_samples is None and sample_reason(router.layers, ("router_inputs",)) is None
    if no_samples is None:
        samples = sample_layers(
            router, tokens, seed, of_stage(progress, STAGES[2]), router_inputs=inputs
        )
    return Readings(
        router=router,
        tokens=tokens,
        statistics=statistics,
        channels=channels,
        widths=widths,
        no_channels=no_channels,
        samples=samples,
        no_samples=no_samples,
        router_inputs=inputs,
    )
