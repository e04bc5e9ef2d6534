"""The sums of a pass over text that has not come to its end, kept now and then.

They are kept as they are, every float64 to its last bit, after whole batches; batches that are
added later give the sums of a pass that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_lens.compress.statistics.array_file import Arrays, Kind, read_arrays, write_arrays
from moe_lens.errors import MoeLensError
from moe_lens.fingerprint import canonical_sha256

KIND = Kind("moe-lens calibration under way", 1, "the sums", "delete it to begin the text anew")

SECONDS = 30.0
"""Between two times that the sums are written; 20 times longer than writing takes at least."""

_SHARE = 20


class Summing(Protocol):
    """A sink whose sums can be taken out and put back."""

    def sums(self) -> tuple[dict[str, Any], Arrays]:
        """Plain values, and arrays by name, that hold everything."""

    def go_on(self, content: dict[str, Any], arrays: Arrays) -> None:
        """Begin with what `sums` gave; LookupError, TypeError or AttributeError if not all."""


class UnderWay:
    """The sums of one sink in one file.

    Args:
        path: The file; None: nothing is kept.
        sink: What adds up. It goes on with the sums of the file, if there are any of this pass.
        batches: The places of the prompts of each batch, which all runs of the pass share.
        what: Plain values that tell this pass from others over the same text.

    Raises:
        MoeLensError: The file is damaged.
    """

    def __init__(
        self, path: Path | None, sink: Summing, batches: Sequence[Sequence[int]], what: Any
    ) -> None:
        self._path, self._sink = path, sink
        self._pass = canonical_sha256([list(map(list, batches)), what])
        self._saved, self._wait = time.monotonic(), SECONDS
        self.done = 0
        """Batches whose sums the sink has, of the first ones."""
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        content, arrays = read_arrays(path, KIND)
        if content.get("pass") != self._pass:
            return
        try:
            self._sink.go_on(content["sums"], arrays)
            self.done = int(content["batches"])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise MoeLensError(f"{path} is incomplete ({error}); {KIND.remedy}") from error

    def added(self, batches: int) -> None:
        """Called when so many more batches are in the sums; writes them if it is time.

        With no batch at all there is nothing to write yet.

        Raises:
            DiskError: The disk refuses.
        """
        self.done += batches
        begun = time.monotonic()
        if self._path is None or not self.done or begun - self._saved < self._wait:
            return
        sums, arrays = self._sink.sums()
        content = {"pass": self._pass, "batches": self.done, "sums": sums}
        write_arrays(self._path, KIND, content, arrays)
        self._saved = time.monotonic()
        self._wait = max(SECONDS, _SHARE * (self._saved - begun))
