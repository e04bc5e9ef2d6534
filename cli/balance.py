"""``moe-lens balance``: do all experts work, and how sure is the router of its choice?"""

from __future__ import annotations

from .analysed import analysed
from .bundles import Reads, Shown, bundled
from .found import present
from .options import (
    Source,
)


@bundled
def balance(
    source: Source,
    reads: Reads,
    shown: Shown,
) -> None:
    """Show how evenly experts are loaded, layer by layer.

    \b
    moe-lens balance demo
    moe-lens balance run/ --output balance.png
    moe-lens balance MODEL --data prompts.jsonl --json

    Compared with a router that chooses at random. A run needs --router-logits when it is recorded
    to show the router's entropy and margin.
    """
    from moe_lens.analysis.balance import balance as find

    with analysed(source, reads, router_logits=True) as read:
        found = find(read.trace, seed=reads.seed, progress=read.progress)
    from moe_lens.figures.balance import draw_balance

    present(found, read.name, shown, draw_balance)
