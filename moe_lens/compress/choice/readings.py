"""All that the methods learn from one calibration text, read once and shared among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.compress.calibration.statistics_reuse import (
    calibrate_channels_once,
    calibrate_once,
)
from moe_lens.compress.checkpoint.expert_width import Widths, widths_of
from moe_lens.compress.resuming.work_folder import WorkFolder
from moe_lens.compress.stages import CALIBRATING, CALIBRATING_CHANNELS, SAMPLING
from moe_lens.compress.statistics.channel_statistics import ChannelCalibration
from moe_lens.compress.statistics.statistics import Calibration
from moe_lens.compress.tensors.unpacked import fastest
from moe_lens.corpus import Corpus
from moe_lens.errors import DiskError, MoeLensError, UnsupportedModelError
from moe_lens.experts.layer_sample import LayerSample, sample_layers, sample_reason
from moe_lens.families import AUTO
from moe_lens.telling import Say, StageProgress, begin

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


SAMPLE_VALUES = ("expert_inputs", "router_logits", "mask")
"""What a layer must show, and take, for methods that judge on a sample."""


@dataclass(frozen=True)
class Readings:
    """What one text says about one model.

    Where something cannot be read, it is None and its `no_...` says why.
    """

    router: ExpertRouter
    """The parent as it runs fastest (`fastest`)."""
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
    work: WorkFolder | None = None,
    stop_at: float | None = None,
    seed: int = 0,
    cpu_experts: str = AUTO,
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
        work: Where sums and channels are kept for a run that goes on; None: nowhere.
        stop_at: As in `calibrate`.
        seed: Of the samples.
        cpu_experts: How experts are computed: ``stock``, ``segmented``, or ``auto``.
        progress: Called with the pass, tokens done and in all.
        say: Told whether the file was used or written.

    Raises:
        UnsupportedModelError, CaptureError, MoeLensError: As `calibrate`.
    """
    packed, router = router, fastest(router, cpu_experts)
    statistics = calibrate_once(
        router,
        corpus,
        statistics_file,
        work,
        similarity=True,
        sequence_length=sequence_length,
        chat_template=chat_template,
        stop_at=stop_at,
        seed=seed,
        progress=begin(progress, CALIBRATING),
        say=say,
    )
    tokens = corpus.tokenize(router.tokenizer, sequence_length, chat_template)
    channels, widths, no_channels = None, None, None
    try:
        widths = widths_of(packed.config, packed.layers)
        if not widths.possible:
            raise UnsupportedModelError("no smaller width can be stored as whole groups")
        channels = calibrate_channels_once(
            router,
            corpus,
            work,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
            progress=begin(progress, CALIBRATING_CHANNELS),
        )
    except DiskError:
        raise
    except MoeLensError as error:
        no_channels = str(error)
    samples, no_samples = None, sample_reason(router.layers, SAMPLE_VALUES)
    inputs = no_samples is None and sample_reason(router.layers, ("router_inputs",)) is None
    if no_samples is None:
        samples = sample_layers(
            router, tokens, seed, begin(progress, SAMPLING), router_inputs=inputs
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
