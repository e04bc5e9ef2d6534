"""``moe-lens balance``: do all experts work, and how sure is the router of its choice?"""

from __future__ import annotations

from .analysed import Reads, analysed
from .found import present
from .options import (
    AnalysedText,
    ChatTemplate,
    Json,
    PictureFile,
    PictureTheme,
    SampleSize,
    Seed,
    SequenceLength,
    Source,
    Stream,
    Theme,
    TrustRemoteCode,
)


def balance(
    source: Source,
    data: AnalysedText = None,
    output: PictureFile = None,
    theme: PictureTheme = Theme.LIGHT,
    sample_size: SampleSize = None,
    sequence_length: SequenceLength = None,
    chat_template: ChatTemplate = False,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    json: Json = False,
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

    reads = Reads(
        data, sample_size, sequence_length, chat_template, seed, trust_remote_code, stream
    )
    with analysed(source, reads, router_logits=True) as read:
        found = find(read.trace, seed=seed, progress=read.progress)
    from moe_lens.figures.balance import save_balance

    present(found, read.name, output=output, save=save_balance, theme=theme, as_json=json)
