"""What the choices of a merge cost on the bundled model, as KL divergence from the parent.

    python benchmarks/merging.py
    python benchmarks/merging.py --experts 6 4 --grouping hc-smoe complete --align none weights

Every combination of the choices is planned from one calibration and one sample, built in memory
and compared with the parent on text that did not calibrate: mean KL(parent || merged) per token in
nats, plus or minus its standard error. The bundled model was made by splitting each of 8 experts
into two, so down to 8 of its 16 experts a merge that finds the pairs is nearly free; below that
experts that differ are merged. A token uses two experts, as in the parent; `moe-lens compress`
measures whether fewer are better (at 8 experts it is one, as both mostly were a pair).
"""

from __future__ import annotations

import argparse
import itertools

from rich.console import Console
from rich.table import Table

from moe_lens.compress import calibrate
from moe_lens.compress.checkpoint.in_memory import in_memory
from moe_lens.compress.merging.merging import ALIGNMENTS, GROUPINGS, ROUTER_ROWS, WEIGHTS, Merging
from moe_lens.compress.merging.planning import plan_merge_to
from moe_lens.compress.verification.losses import compare
from moe_lens.corpus import read_corpus
from moe_lens.experts.layer_sample import sample_layers
from moe_lens.router import ExpertRouter


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", nargs="+", type=int, default=[6, 4])
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--grouping", nargs="+", choices=GROUPINGS, default=["hc-smoe"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["frequency", "saliency"])
    parser.add_argument("--align", nargs="+", choices=ALIGNMENTS, default=["none", "weights"])
    parser.add_argument("--router-rows", nargs="+", choices=ROUTER_ROWS, default=["fitted", "mean"])
    parser.add_argument("--calibration-prompts", type=int, default=24)
    parser.add_argument("--evaluation-prompts", type=int, default=12)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    asked, console = _arguments(), Console()
    router = ExpertRouter.from_pretrained("demo")
    learn = read_corpus("demo").sample(asked.calibration_prompts, 0)
    test = read_corpus("demo:evaluation").sample(asked.evaluation_prompts, 0)
    calibration = calibrate(router, learn, sequence_length=512, similarity_tokens=1024)
    tokens = learn.tokenize(router.tokenizer, 512)
    samples = sample_layers(router, tokens, router_inputs=True)
    held_out = test.tokenize(router.tokenizer, 512)
    vocabulary = router.forward([[0]]).shape[-1]
    for experts in asked.experts:
        table = Table("grouping", "weights", "align", "router rows", "KL, nats per token")
        for choices in itertools.product(
            asked.grouping, asked.weights, asked.align, asked.router_rows
        ):
            grouping, weights, align, router_rows = choices
            merging = Merging(grouping, weights, align, router_rows)
            plan = plan_merge_to(
                calibration,
                experts,
                experts_per_token=asked.experts_per_token,
                merging=merging,
                samples=samples,
            )
            smaller = in_memory(router, plan)
            found = compare(router.forwards, [smaller.forwards], held_out, vocabulary)[0]
            error = found.kl.std() / len(found.kl) ** 0.5
            table.add_row(*choices, f"{found.kl.mean():.4f} +- {error:.4f}")
        console.print(f"{experts} of {calibration.model.num_experts} experts")
        console.print(table)


if __name__ == "__main__":
    main()
