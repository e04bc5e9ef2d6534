"""Everything that a model, a recorded run, or both of them say about the likeness of experts.

tokens = [routes.token_ids for routes in trace.prompts()]
material = Material(
    layers=router.layers, trace=trace, sample=partial(sample_layers, router, tokens)
)
found = compare(material)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from moe_lens.errors import UnsupportedModelError, UsageError
from moe_lens.experts.layer_sample import LayerSample
from moe_lens.experts.mean_outputs import MeanOutputs
from moe_lens.families import MoELayer
from moe_lens.telling import Progress, Stage, StageProgress, begin
from moe_lens.trace import Trace

from .measures import Measure
from .outputs import compare_means, compare_samples
from .routing import compare_routing
from .similarity import ExpertSimilarity, similarity
from .weights import read_weights

__all__ = ["KINDS", "Material", "compare"]

KINDS = ("weights", "outputs", "routing")

READING = Stage("reading", "tokens")
SAMPLING = Stage("sampling", "tokens")
OUTPUTS = Stage("comparing outputs", "layers")
WEIGHTS = Stage("comparing weights", "layers")
AGREEMENT = Stage("comparing measures", "layers")


@dataclass(frozen=True)
class Material:
    """What there is to compare experts by.

    Attributes:
        layers: The MoE layers of a loaded model, for their weights.
        trace: A recorded run, for routing.
        sample: Gives what each layer reads on sampled tokens, for outputs; `sample_layers` with
            all but its progress.
        means: Mean outputs over routed tokens.
    """

    layers: Sequence[MoELayer] = ()
    trace: Trace | None = None
    sample: Callable[..., list[LayerSample]] | None = None
    means: MeanOutputs | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """Model layer index of each MoE layer."""
        if self.trace is not None:
            return self.trace.layers
        return tuple(layer.index for layer in self.layers)


def compare(
    material: Material,
    kinds: Collection[str] = KINDS,
    *,
    align: int | None = None,
    spectra: int | None = None,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> ExpertSimilarity:
    """Compare experts by all `kinds` that there is material for.

    Args:
        material: What there is.
        kinds: Of `KINDS`.
        align, spectra: As in `read_weights`.
        seed: Of everything drawn.
        progress: Called with stage, done and in all.

    Raises:
        UsageError: There is nothing to compare, or a layer has a single expert.
    """
    for layer in material.layers:
        if layer.num_experts < 2:
            raise UsageError(
                f"layer {layer.index} has {layer.num_experts} expert, which nothing can be "
                "compared with"
            )
    routing: tuple[Measure, ...] = ()
    if "routing" in kinds and material.trace is not None:
        routing = compare_routing(
            material.trace, _experts(material), seed=seed, progress=begin(progress, READING)
        )
    outputs, notes = _outputs(material, progress) if "outputs" in kinds else ([], [])
    reading = None
    if "weights" in kinds and material.layers:
        reading = read_weights(
            material.layers,
            align=align,
            spectra=spectra,
            seed=seed,
            progress=begin(progress, WEIGHTS),
        )
    last: Progress | None = begin(progress, AGREEMENT)
    return similarity(
        material.indices, reading, outputs, routing, notes=notes, seed=seed, progress=last
    )


def _outputs(material: Material, progress: StageProgress | None) -> tuple[list[Measure], list[str]]:
    found: list[Measure] = []
    notes = []
    if material.sample is not None:
        try:
            samples = material.sample(progress=begin(progress, SAMPLING))
        except UnsupportedModelError as error:
            notes.append(f"Outputs on the same tokens are not compared: {error}.")
        else:
            found += compare_samples(samples, begin(progress, OUTPUTS))
    if material.means is not None:
        found += compare_means(material.means.means(layer) for layer in material.indices)
    return found, notes


def _experts(material: Material) -> list[int]:
    """E of each MoE layer; of a run alone, the number that it was recorded with."""
    if material.layers:
        return [layer.num_experts for layer in material.layers]
    assert material.trace is not None
    return [int(material.trace.header["num_experts"])] * len(material.trace.layers)
