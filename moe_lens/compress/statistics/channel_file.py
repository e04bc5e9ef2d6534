"""The channels of a calibration as one file, so that a run that was stopped need not read again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from moe_lens.compress.plan.identity import CorpusIdentity, ModelIdentity
from moe_lens.errors import MoeLensError

from .array_file import Kind, read_arrays, write_arrays
from .channel_statistics import ChannelCalibration, ChannelStatistics

KIND = Kind("moe-lens channels", 1, "the channels", "delete it and calibrate again")

_ARRAYS = tuple(field.name for field in fields(ChannelStatistics) if field.name != "layer")


def save_channels(found: ChannelCalibration, path: Path) -> None:
    """Write the channels, whole or not at all, in the precision they have.

    Raises:
        DiskError: The disk refuses.
    """
    arrays = {
        f"layers.{each.layer}.{name}": getattr(each, name)
        for each in found.layers
        for name in _ARRAYS
    }
    content = {
        "model": found.model.to_dict(),
        "corpus": found.corpus.to_dict(),
        "layers": [each.layer for each in found.layers],
    }
    write_arrays(path, KIND, content, arrays)


def load_channels(path: Path) -> ChannelCalibration:
    """Read what `save_channels` wrote.

    Raises:
        MoeLensError: The file is damaged, holds something else, or is of another version.
    """
    content, arrays = read_arrays(path, KIND)
    try:
        return ChannelCalibration(
            ModelIdentity(**content["model"]),
            CorpusIdentity(**content["corpus"]),
            tuple(
                ChannelStatistics(
                    layer, **{name: arrays[f"layers.{layer}.{name}"] for name in _ARRAYS}
                )
                for layer in content["layers"]
            ),
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise MoeLensError(f"{path} is incomplete ({error}); {KIND.remedy}") from error
