"""``moe-lens locality``: do neighbouring tokens go to the same experts?"""

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


def locality(
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
    """Show how often neighbouring tokens share experts.

    \b
    moe-lens locality demo
    moe-lens locality run/ --output locality.png
    moe-lens locality MODEL --data prompts.jsonl --json

    Compared with experts drawn at random, and with the same tokens in shuffled order.
    """
    from moe_lens.analysis.locality import locality as find

    reads = Reads(
        data, sample_size, sequence_length, chat_template, seed, trust_remote_code, stream
    )
    with analysed(source, reads) as read:
        found = find(read.trace, seed=seed, progress=read.progress)
    from moe_lens.figures.locality import save_locality

    present(found, read.name, output=output, save=save_locality, theme=theme, as_json=json)
