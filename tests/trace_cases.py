"""Traces on disk for tests of analyses, made of routes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_lens.corpus.batches import plan_shards
from moe_lens.recording.writer import TraceWriter
from moe_lens.trace import Routes, Trace


def trace_of(
    folder: Path,
    routes: Routes,
    labels: Sequence[str | None] = (),
    *,
    shard_tokens: int = 40,
    name: str = "synthetic",
) -> Trace:
    """A trace that holds `routes`, of as many prompts as there are labels (or as they name)."""
    prompts = len(labels) or int(routes.prompt.max()) + 1
    labels = list(labels) or [None] * prompts
    lengths = np.bincount(routes.prompt, minlength=prompts)
    shards = plan_shards(lengths.tolist(), shard_tokens)
    header = {
        "format": "moe-lens trace",
        "version": 1,
        "model": {"name": name},
        "layers": list(routes.layers),
        "num_experts": routes.router_width,
        "router_width": routes.router_width,
        "experts_per_token": routes.slots,
        "corpus": {"name": "made", "fingerprint": "0" * 64, "tokens_sha256": "0" * 64, "notes": []},
        "settings": {"router_logits": routes.router_logits is not None},
        "versions": {"moe_lens": "0", "mlx": "0", "mlx_lm": "0", "device": "none"},
        "definitions": {},
    }
    content = {"tokens": lengths.tolist(), "labels": labels, "sha256": ["0" * 16] * prompts}
    with TraceWriter(
        folder, header, content, routes.texts, shards, resume=False, overwrite=False
    ) as writer:
        for shard in shards:
            rows = np.flatnonzero((routes.prompt >= shard.start) & (routes.prompt < shard.stop))
            writer.write(routes.take(rows))
        writer.finish()
    return Trace.open(folder)
