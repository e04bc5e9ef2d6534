"""``moe-lens locality``: do neighbouring tokens go to the same experts?"""

from __future__ import annotations

from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .options import (
    Source,
)


@bundled
def locality(
    source: Source,
    reads: Reads,
    shown: Shown,
) -> None:
    """Show how often neighbouring tokens share experts.

    \b
    moe-lens locality demo
    moe-lens locality run/ --output locality.png
    moe-lens locality MODEL --data prompts.jsonl --json

    Compared with experts drawn at random, and with the same tokens in shuffled order.
    """
    from moe_lens.analysis.locality import locality as find

    with analysed(source, reads) as read:
        found = find(read.trace, seed=reads.seed, progress=read.progress)
    from moe_lens.figures.locality import draw_locality

    present(found, read.name, shown, draw_locality)
