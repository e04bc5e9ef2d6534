"""What every compression method loses on the bundled model, at the same bytes.

    python benchmarks/compression.py
    python benchmarks/compression.py --seeds 0 1 2 3 4 --output compression.json

At 25 % and at 50 % fewer expert bytes, every method makes its plan from a calibration sample, and
all plans are measured against the parent on the held-out text (``demo:evaluation``), which no plan
and no choice sees. ``auto`` is the plan that `moe-lens compress` would take: it chooses on a third
of the sample, the validation text. Several samples (seeds) draw other calibration prompts; the
held-out prompts are the same for all.

A row has the mean KL over the seeds, the smallest and the largest of them, and perplexity (of the
mean negative log-likelihood over the seeds); intervals are the middle 95 % of a bootstrap over the
held-out prompts. About 10 minutes on two CPU cores when MLX
finds OpenBLAS (`moe-lens doctor` says whether it does); plans are tried on unpacked weights in
float32, so figures agree with a verification of the written model up to rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_lens.bootstrap import Bootstrap
from moe_lens.compress.calibration.calibration import identify_corpus
from moe_lens.compress.calibration.validation_split import split
from moe_lens.compress.choice.asked_size import AskedSize
from moe_lens.compress.choice.choice import AUTO, choose
from moe_lens.compress.choice.methods import possible_shapes
from moe_lens.compress.choice.readings import read_all
from moe_lens.compress.choice.trials import Trial, TrialBench
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import SizeTable
from moe_lens.compress.tensors.unpacked import fastest
from moe_lens.corpus import read_corpus
from moe_lens.router import ExpertRouter

RATIOS = (0.25, 0.5)
REFERENCE = "reap"
Floats = NDArray[np.float64]


@dataclass
class Method:
    """What one method lost at one size, seed by seed."""

    name: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def kl(self) -> Floats:
        """[positions] mean over the seeds."""
        return np.mean([trial.kl for trial in self.trials], axis=0)

    def row(self) -> dict[str, Any]:
        """Plain values."""
        each = [trial.loss.kl.value for trial in self.trials]
        bootstrap = Bootstrap(self.trials[0].prompt)
        nll = np.mean([trial.nll for trial in self.trials], axis=0)
        return {
            "method": self.name,
            "seeds": len(self.trials),
            "kl": bootstrap.measure(self.kl).to_dict(),
            "kl_by_seed": each,
            "perplexity": bootstrap.measure(nll, transform=np.exp).to_dict(),
            "perplexity_by_seed": [trial.loss.perplexity_after.value for trial in self.trials],
            "megabytes": [trial.bytes / 1e6 for trial in self.trials],
            "experts": [trial.shape.num_experts for trial in self.trials],
            "channels": [trial.shape.expert_width for trial in self.trials],
            "experts_per_token": [trial.plan.experts_per_token for trial in self.trials],
        }


def measure(options: argparse.Namespace, show: Progress) -> dict[str, Any]:
    """All sizes and seeds."""
    router = ExpertRouter.from_pretrained(options.model)
    table = SizeTable.of(open_parent(options.model))
    test = read_corpus(options.eval_data).sample(options.eval_prompts, 0)
    parent = fastest(router)
    held_out = TrialBench(parent, test.tokenize(router.tokenizer, 512), table)
    found: dict[float, dict[str, Method]] = {ratio: defaultdict(_nameless) for ratio in RATIOS}
    limits: dict[float, int] = {}
    task = show.add_task("")
    chosen: dict[str, list[str]] = defaultdict(list)
    for seed in options.seeds:
        show.update(task, description=f"seed {seed}: reading")
        sample = read_corpus(options.data).sample(options.prompts, seed)
        learn, validation = split(sample, seed)
        readings = read_all(router, learn, seed=seed)
        tokens = validation.tokenize(router.tokenizer, 512)
        bench = TrialBench(readings.router, tokens, table, seed=seed)
        text = identify_corpus(validation, tokens, 512, seed)
        shapes = possible_shapes(readings)
        for ratio in RATIOS:
            limits[ratio] = AskedSize(ratio=ratio).limit(table, readings.statistics.model, shapes)
            choice = choose(
                readings,
                bench,
                text,
                limits[ratio],
                seed=seed,
                progress=lambda stage, done, total, place=(seed, ratio): show.update(
                    task, description=f"seed {place[0]}, {place[1]:.0%} less: {stage}"
                ),
            )
            chosen[f"{ratio:g}"].append(choice.best.name)
            tried: dict[tuple[str, int], Trial] = {}
            for trial in choice.trials:
                # Of the splits of experts and channels, and of the experts per token, each method
                # is shown as auto would take it: with what lost least on the validation text.
                if any(name == trial.name for name, _ in tried):
                    continue
                show.update(task, description=f"seed {seed}, {ratio:.0%} less: {trial.name}")
                made = held_out.try_plan(trial.name, trial.plan)[0]
                tried[trial.name, 0] = made
                name = "removal + channels" if " + " in trial.name else trial.name
                _add(found[ratio], name, made)
            _add(found[ratio], AUTO, replace(tried[choice.best.name, 0], name=AUTO))
    return {
        "model": options.model,
        "seeds": options.seeds,
        "calibration_prompts": options.prompts,
        "held_out": {
            "name": test.name,
            "prompts": len(test),
            "tokens": len(_any(found).kl),
            "perplexity_before": _any(found).loss.perplexity_before.to_dict(),
        },
        "parent_megabytes": table.bytes(table.full) / 1e6,
        "sizes": [
            {
                "ratio": ratio,
                "limit_megabytes": limits[ratio] / 1e6,
                "chosen": chosen[f"{ratio:g}"],
                "methods": [
                    {**each.row(), **_against(each, found[ratio][REFERENCE])}
                    for each in sorted(found[ratio].values(), key=lambda each: each.kl.mean())
                ],
            }
            for ratio in RATIOS
        ],
    }


def _any(found: dict[float, dict[str, Method]]) -> Trial:
    """One of the trials, all of which have the same parent and text."""
    return next(iter(found[RATIOS[0]].values())).trials[0]


def _nameless() -> Method:
    return Method("")


def _add(methods: dict[str, Method], name: str, trial: Trial) -> None:
    methods[name].name = name
    methods[name].trials.append(trial)


def _against(each: Method, reference: Method) -> dict[str, Any]:
    """How many times the reference's KL is this one's, over the same held-out prompts."""
    ratio = Bootstrap(each.trials[0].prompt).measure(
        reference.kl, each.kl, transform=lambda other, own: other / own
    )
    return {f"{REFERENCE}_times": ratio.to_dict()}


def show_tables(console: Console, result: dict[str, Any]) -> None:
    """A table for each size."""
    held = result["held_out"]
    for size in result["sizes"]:
        table = Table(
            title=f"{size['ratio']:.0%} fewer expert bytes: at most "
            f"{size['limit_megabytes']:.2f} of {result['parent_megabytes']:.2f} MB; "
            f"{held['tokens']:,} tokens of {held['prompts']} held-out prompts, on which the parent "
            f"has a perplexity of {held['perplexity_before']['value']:.4g}; auto chose "
            f"{', '.join(size['chosen'])}",
            title_justify="left",
        )
        table.add_column("method")
        for name in (
            "MB",
            "experts x channels, k",
            "KL (nats)",
            "95 % interval",
            "least and most of the seeds",
            "perplexity",
            "95 % interval",
            f"times less than {REFERENCE}",
        ):
            table.add_column(name, justify="right")
        for row in size["methods"]:
            kl, times = row["kl"], row[f"{REFERENCE}_times"]
            shapes = zip(row["experts"], row["channels"], row["experts_per_token"], strict=True)
            table.add_row(
                row["method"],
                f"{np.mean(row['megabytes']):.2f}",
                "; ".join(dict.fromkeys(f"{e} x {c}, {k}" for e, c, k in shapes)),
                f"{kl['value']:.4g}",
                f"{kl['low']:.4g} to {kl['high']:.4g}",
                f"{min(row['kl_by_seed']):.4g} to {max(row['kl_by_seed']):.4g}",
                f"{row['perplexity']['value']:.4g}",
                f"{row['perplexity']['low']:.4g} to {row['perplexity']['high']:.4g}",
                f"{times['value']:.3g} ({times['low']:.3g} to {times['high']:.3g})",
            )
        console.print(table)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo", help="calibration text")
    parser.add_argument("--eval-data", default="demo:evaluation", help="held-out text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=128, help="of each calibration sample")
    parser.add_argument("--eval-prompts", type=int, default=48, help="of the held-out text")
    parser.add_argument("--output", type=Path, help="a file for all numbers as JSON")
    options = parser.parse_args()
    console, start = Console(), time.monotonic()
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as show:
        result = measure(options, show)
    result["seconds"] = round(time.monotonic() - start)
    show_tables(console, result)
    console.print(f"{result['seconds']} s")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
