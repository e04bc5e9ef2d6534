"""The good files that are damaged: made once for a run, by the program itself."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path

from moe_lens.compress import calibrate, plan_prune
from moe_lens.compress.merging.planning import plan_merge_to
from moe_lens.compress.statistics.statistics_file import save_statistics
from moe_lens.corpus import read_corpus
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import narrow_plan, write_words

MODELS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "dbrx", "longcat_flash_ngram")


class GoodFiles:
    """Everything below one folder; each piece is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, name: str = "qwen3_moe", quantise: int | None = None) -> Path:
        """A tiny checkpoint."""
        folder = self._folder / f"{name}-{quantise}"
        if not folder.exists():
            save_checkpoint(name, folder, quantise)
        return folder

    @cached_property
    def router(self) -> ExpertRouter:
        """The tiny model that plans, traces and statistics are of."""
        return ExpertRouter.from_pretrained(self.model())

    @cached_property
    def text(self) -> Path:
        """A corpus of words."""
        return write_words(self._folder / "words.jsonl", prompts=6, seed=0, words=20)

    @cached_property
    def statistics(self) -> Path:
        """Of the text."""
        path = self._folder / "statistics.safetensors"
        corpus = read_corpus(str(self.text))
        save_statistics(calibrate(self.router, corpus, similarity_tokens=64), path)
        return path

    @cached_property
    def plans(self) -> tuple[str, ...]:
        """A removal, a merge with orders of channels and router rows, and one of channels."""
        found = calibrate(self.router, read_corpus(str(self.text)), similarity_tokens=64)
        plans = (
            plan_prune(found, experts=6),
            plan_merge_to(found, 6),
            narrow_plan(self.router, 32),
        )
        return tuple(plan.to_json() for plan in plans)

    @cached_property
    def trace(self) -> Path:
        """A recorded run."""
        folder = self._folder / "trace"
        self.router.trace(str(self.text), folder, router_logits=True)
        return folder

    @cached_property
    def stopped(self) -> Path:
        """A folder in which a run was stopped while it wrote ``smaller`` from ``plan.json``."""
        from moe_lens.compress import write

        folder = self._folder / "stopped"
        folder.mkdir()
        (folder / "plan.json").write_text(self.plans[0])
        try:
            write(
                folder / "plan.json",
                self.model(),
                folder / "smaller",
                shard_bytes=100_000,
                progress=_Stop(),
            )
        except KeyboardInterrupt:
            return folder
        raise AssertionError("the run was not stopped")

    def sharded(self) -> Path:
        """The tiny checkpoint in several files with an index."""
        folder = self._folder / "sharded"
        if not folder.exists():
            from moe_lens.checkpoint_files.folder import open_tensors, weight_files
            from moe_lens.compress.checkpoint.tensor_file import write_shards

            shutil.copytree(self.model(), folder)
            tensors = open_tensors(weight_files(self.model()))
            (folder / "model.safetensors").unlink()
            write_shards(folder, tensors, 1, shard_bytes=200_000)
            assert len(set(_shard_names(folder))) > 2
        return folder


def _shard_names(folder: Path) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return list(index["weight_map"].values())


class _Stop:
    """Stops a run after two weight files."""

    def __call__(self, done: int, total: int) -> None:
        if done > 250_000:
            raise KeyboardInterrupt
