"""Experts by segment on a CPU: the numbers of stock MLX, whoever watches, and a way back."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchMLP
from mlx_lm.utils import quantize_model
from typer.testing import CliRunner

import moe_lens
from moe_lens.cli.app import app
from moe_lens.compress import compress, frontier, read_plan, verify
from moe_lens.compress.calibration.statistics_reuse import calibrate_once
from moe_lens.compress.tensors import unpacked
from moe_lens.corpus import Corpus, Prompt, read_corpus
from moe_lens.errors import UsageError
from moe_lens.families import LIST_NOTE, cpu_experts, decide, segments
from moe_lens.instrument import Forward
from moe_lens.router import ExpertRouter
from tiny_models import CONFIGS, build, save_checkpoint
from twins import save_twins, write_words

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="experts are computed by segment on MLX's CPU backend"
)

TOKENS = np.random.default_rng(0).integers(1, 126, (2, 40))
"""About 20 rows for each of 8 experts, of which 2 are chosen: packed weights are unpacked."""

MODES = ("float32", "affine", "mxfp4")

ROUNDS = {"muse_spark": 2e-3}
"""Relative tolerance of models that round to bfloat16 between their layers, however they run."""


def router_of(name: str, mode: str = "float32") -> ExpertRouter:
    model, config = build(name)
    if mode != "float32":
        bits = {"group_size": 32, "bits": 4, "mode": mode}
        model, config = quantize_model(model, config, **bits)
    return ExpertRouter(model, None, config, name=name)


# Agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_answers_as_stock_mlx_does(name: str) -> None:
    for mode in MODES if name in ("qwen3_moe", "gpt_oss", "nemotron_h") else MODES[:2]:
        router = router_of(name, mode)
        stock = router.forward(TOKENS)
        router.cpu_experts = "segmented"
        found = router.forward(TOKENS)
        listed = router.layers[0].list_experts
        assert router.cpu_experts == ("stock" if listed else "segmented")
        assert listed == (name == "dbrx")
        scale = float(mx.abs(stock).max())
        assert float(mx.abs(found - stock).max()) <= ROUNDS.get(name, 1e-5) * scale
        assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(stock, axis=-1))
        router.cpu_experts = "stock"
        assert mx.array_equal(router.forward(TOKENS), stock)
        router.close()


ACTIVATIONS = {
    "swiglu": (SwiGLU(), lambda x, gate: gate / (1 + np.exp(-gate)) * x),
    "another": (lambda x, gate: mx.abs(gate) * x, lambda x, gate: np.abs(gate) * x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [None, "affine", "nvfp4"])
def test_a_gated_block_with_biases_is_what_its_formula_says(
    activation: str, packed: str | None
) -> None:
    mx.random.seed(1)
    live, formula = ACTIVATIONS[activation]
    block = SwitchGLU(64, 96, 4, activation=live, bias=True)
    named = {"gate_proj": block.gate_proj, "up_proj": block.up_proj, "down_proj": block.down_proj}
    dense = {}
    for name, each in named.items():
        each.bias = mx.random.normal(each.bias.shape)
        if packed is not None:
            size = {"affine": 32, "nvfp4": 16}[packed]
            made = each.to_quantized(size, 4, packed, global_scale=packed == "nvfp4")
            setattr(block, name, made)
            dense[name] = np.stack([_dense(made, expert) for expert in range(4)])
        else:
            dense[name] = np.array(each.weight).astype(np.float64)
    ids = mx.array(np.random.default_rng(2).integers(0, 4, (3, 20, 2)).astype(np.uint32))
    x = mx.random.normal((3, 20, 64))
    expected = np.zeros((3, 20, 2, 64))
    bias = {name: np.array(block[name].bias).astype(np.float64) for name in named}
    for place in np.ndindex(3, 20, 2):
        expert, row = int(ids[place].item()), np.array(x[place[:2]]).astype(np.float64)
        gate, up = (
            dense[name][expert] @ row + bias[name][expert] for name in ("gate_proj", "up_proj")
        )
        answer = dense["down_proj"][expert] @ formula(up, gate)
        expected[place] = answer + bias["down_proj"][expert]
    cpu_experts._change([_Layer(block)], cpu_experts._SEGMENTED)
    found = block(x, ids)
    assert type(block).__name__ == "SegmentedSwitchGLU"
    assert np.abs(np.array(found) - expected).max() <= 1e-5 * np.abs(expected).max()


class _Layer:
    """As much of a MoE layer as its experts."""

    list_experts = False

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts


def _dense(module: QuantizedSwitchLinear, expert: int) -> np.ndarray:
    scale = module.get("global_scale")
    biases = module.get("biases")
    weight = mx.dequantize(
        module.weight[expert],
        module.scales[expert],
        None if biases is None else biases[expert],
        module.group_size,
        module.bits,
        module.mode,
        global_scale=None if scale is None else scale[expert],
        dtype=mx.float32,
    )
    return np.array(weight).astype(np.float64)


def test_a_plain_block_uses_any_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(3)
    block = SwitchMLP(32, 48, 6, activation=nn.GELU(approx="precise"), bias=True)
    block.fc1.bias, block.fc2.bias = mx.random.normal((6, 48)), mx.random.normal((6, 32))
    x, ids = mx.random.normal((50, 32)), mx.random.randint(0, 6, (50, 3))
    stock = block(x, ids)
    cpu_experts._change([_Layer(block)], cpu_experts._SEGMENTED)
    # The whole block runs by segment, not its projections one after the other.
    monkeypatch.setattr(segments, "multiplied", None)
    assert float(mx.abs(block(x, ids) - stock).max()) <= 1e-5 * float(mx.abs(stock).max())


def test_a_gate_far_below_zero_closes_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    channels = [np.float32([[2.0, 2.0, 2.0]]), np.float32([[-200.0, 0.0, 200.0]])]
    assert segments._activated(SwiGLU(), channels).tolist() == [[0.0, 0.0, 400.0]]
    assert not recwarn.list


def test_gradients_are_refused_rather_than_wrong() -> None:
    router = router_of("qwen3_moe")
    tokens = mx.array(TOKENS)
    gradients = nn.value_and_grad(router.model, lambda model: mx.square(model(tokens)).sum())
    gradients(router.model)
    router.cpu_experts = "segmented"
    with pytest.raises(UsageError, match="set `cpu_experts` to stock"):
        gradients(router.model)


# Few rows, many threads ------------------------------------------------------------------------


def test_packed_weights_are_unpacked_only_for_enough_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unpacking: list[int] = []
    real = segments._Matrices._unpacked

    def unpack(matrices: segments._Matrices, expert: int) -> np.ndarray:
        unpacking.append(expert)
        return real(matrices, expert)

    monkeypatch.setattr(segments._Matrices, "_unpacked", unpack)
    router = router_of("qwen3_moe", "affine")
    alone = router.forward([[1, 2, 3]])
    router.cpu_experts = "segmented"
    assert mx.array_equal(router.forward([[1, 2, 3]]), alone)  # MLX's own product, to the last bit
    assert not unpacking
    router.forward(TOKENS)
    assert len(unpacking) == 3 * 8 * len(router.layers)


def test_small_products_stay_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    seen: list[int] = []
    real = segments._Matrices.product

    def product(matrices: segments._Matrices, rows: np.ndarray, expert: int) -> np.ndarray:
        seen.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        return real(matrices, rows, expert)

    monkeypatch.setattr(segments._Matrices, "product", product)
    router = router_of("qwen3_moe")
    router.cpu_experts = "segmented"
    with threadpool_limits(2, user_api="blas"):
        router.forward([[1, 2, 3]])
        assert set(seen) == {1}
        seen.clear()
        monkeypatch.setattr(segments, "ONE_THREAD", 1)
        router.forward([[1, 2, 3]])
        assert 2 in seen


# The seams -------------------------------------------------------------------------------------


class Keeps:
    """A sink that keeps some values of one forward."""

    def __init__(self, *values: str) -> None:
        self.values = frozenset(values)
        self.found: dict[tuple[str, int], np.ndarray] = {}

    def record(self, forward: Forward) -> None:
        for layer in forward.layers:
            for name in self.values:
                self.found[name, layer] = np.array(forward.value(name, layer))


@pytest.mark.parametrize("mode", ["float32", "affine"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_what_is_seen_is_the_same_and_seeing_changes_nothing(name: str, mode: str) -> None:
    router = router_of(name, mode)
    values = ("expert_ids", "expert_weights", "expert_outputs", "expert_channels", "routed_output")
    sinks = {how: Keeps(*values) for how in ("stock", "segmented")}
    for how, sink in sinks.items():
        router.cpu_experts = how
        plain = router.forward(TOKENS)
        with router.recording(sink):
            watched = router.forward(TOKENS)
        assert mx.array_equal(watched, plain), how
    for key, expected in sinks["stock"].found.items():
        found = sinks["segmented"].found[key]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), key


def test_overrides_and_channel_masks_work_on_top() -> None:
    router = router_of("qwen3_moe")
    layer = router.layers[1]
    mask = mx.random.bernoulli(0.5, (layer.num_experts, layer.expert_width)).astype(mx.float32)
    found = {}
    for how in ("stock", "segmented"):
        router.cpu_experts = how
        with router.override(k=1), router.channel_masks({layer.index: mask}):
            found[how] = np.array(router.forward(TOKENS))
    plain = np.array(router.forward(TOKENS))
    scale = np.abs(found["stock"]).max()
    assert np.abs(found["segmented"] - found["stock"]).max() <= 1e-5 * scale
    assert np.abs(found["segmented"] - plain).max() > 1e-3 * scale


def test_it_is_changed_outside_of_blocks_only_and_put_back_at_the_end() -> None:
    router = moe_lens.ExpertRouter.from_pretrained("demo", cpu_experts="auto")
    assert router.cpu_experts == "segmented"
    with router.capture("expert_ids"):
        with pytest.raises(UsageError, match="outside of `capture`"):
            router.cpu_experts = "stock"
        router.forward([[1, 2, 3]])
    classes = {type(module).__module__ for module in router.model.modules()}
    assert "moe_lens.families.cpu_experts" in classes
    router.close()
    assert router.cpu_experts == "stock"
    assert not any(type(m).__module__.startswith("moe_lens") for m in router.model.modules())
    assert moe_lens.ExpertRouter.from_pretrained("demo").cpu_experts == "stock"


def test_a_twin_shares_the_weights_and_nothing_else() -> None:
    router = router_of("qwen3_moe", "affine")
    expected = router.forward(TOKENS)
    before = mx.get_active_memory()
    twin = router.twin()
    mx.eval(twin.model.parameters())
    size = sum(value.nbytes for _, value in tree_flatten(router.model.parameters()))
    assert mx.get_active_memory() - before < size / 10
    unpacked.unpack(twin.model)
    twin.cpu_experts = "segmented"
    with twin.override(k=1):
        twin.forward(TOKENS)
    assert router.cpu_experts == "stock"
    assert mx.array_equal(router.forward(TOKENS), expected)
    packed = [module for module in router.model.modules() if "scales" in module]
    assert packed
    assert not any("scales" in module for module in twin.model.modules())


def test_a_streamed_model_is_computed_by_segment_layer_by_layer(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "packed", 4)
    whole = ExpertRouter.from_pretrained(source, cpu_experts="segmented")
    streamed = ExpertRouter.from_pretrained(source, stream=True)
    fast = unpacked.fastest(streamed)
    assert fast.streamed
    assert (fast.cpu_experts, streamed.cpu_experts) == ("segmented", "stock")
    assert mx.array_equal(fast.forward(TOKENS), unpacked.fastest(whole).forward(TOKENS))
    assert not mx.array_equal(streamed.forward(TOKENS), fast.forward(TOKENS))
    assert any("scales" in module for module in streamed.model.modules())
    assert not any("scales" in module for module in fast.model.modules())
    assert mx.array_equal(fast.forward(TOKENS), unpacked.fastest(whole).forward(TOKENS))


# What runs fastest -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "kinds"),
    [
        (1 << 40, set()),
        (1_400_000, {"SegmentedQuantizedSwitchLinear"}),
        (1000, {"SegmentedQuantizedSwitchLinear", "QuantizedLinear", "QuantizedEmbedding"}),
    ],
)
def test_what_fits_into_a_quarter_of_the_memory_is_unpacked(
    monkeypatch: pytest.MonkeyPatch, available: int, kinds: set[str]
) -> None:
    router = router_of("qwen3_moe", "affine")
    expected = router.forward(TOKENS)
    monkeypatch.setattr(unpacked, "memory", lambda: moe_lens.machine.facts.Memory(None, available))
    fast = unpacked.fastest(router)
    assert {type(m).__name__ for m in fast.model.modules() if "scales" in m} == kinds
    assert fast.cpu_experts == "segmented"
    assert float(mx.abs(fast.forward(TOKENS) - expected).max()) <= 1e-5 * float(
        mx.abs(expected).max()
    )
    assert unpacked.fastest(fast) is fast
    router.cpu_experts = "segmented"
    fast = unpacked.fastest(router)
    assert {type(m).__name__ for m in fast.model.modules() if "scales" in m} == kinds


# What is asked for -----------------------------------------------------------------------------


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="auto, stock or segmented, not 'fast'"):
        moe_lens.ExpertRouter.from_pretrained("demo", cpu_experts="fast")
    monkeypatch.setattr(cpu_experts.mx, "default_device", lambda: mx.gpu)
    assert decide("auto") == decide("stock") == "stock"
    with pytest.raises(UsageError, match=r"this is a GPU.*use auto or stock"):
        decide("segmented")


def test_experts_in_a_list_are_stock_and_that_is_said(tmp_path: Path) -> None:
    source = save_checkpoint("dbrx", tmp_path / "dbrx")
    write_words(tmp_path / "learn.jsonl", 6, 1, words=8)
    result = compress(
        source,
        ratio=0.25,
        method="frequency",
        calibration=tmp_path / "learn.jsonl",
        evaluation=Corpus("test", (Prompt("w3 w4 w5 w6"),)),
        dry_run=True,
        cpu_experts="segmented",
    )
    assert LIST_NOTE in result.notes
    assert result.plan.settings["cpu_experts"] == "stock"


# Results say which path computed them ----------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    save_twins(folder / "twins")
    write_words(folder / "learn.jsonl", 12, 1, words=16)
    write_words(folder / "test.jsonl", 6, 2, words=16)
    return folder


def _compress(place: Path, how: str, output: str, *more: str) -> dict:
    arguments = [
        *("compress", str(place / "twins"), "--ratio", "0.25", "--method", "reap", "--json"),
        *("--data", str(place / "learn.jsonl"), "--eval-data", str(place / "test.jsonl")),
        *("--cpu-experts", how, "--output", str(place / output), *more),
    ]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_the_same_model_comes_out_and_the_path_stands_everywhere(place: Path) -> None:
    results = {how: _compress(place, how, how) for how in ("stock", "auto")}
    words = {"stock": "CPU in float32", "auto": "CPU in float32, experts by segment"}
    for how, result in results.items():
        actual = "segmented" if how == "auto" else "stock"
        assert result["plan"]["settings"]["cpu_experts"] == actual
        assert result["verification"]["device"] == words[how]
        report = json.loads((place / how / "report.json").read_text())
        assert report["calibration"]["cpu_experts"] == actual
        assert report["verification"]["device"] == words[how]
        assert f"computed on the {words[how]}." in (place / how / "README.md").read_text()
        said = "--cpu-experts stock" in report["commands"]["compress"]
        assert said == (how == "stock")
        # A stock load is compared with the model as it is, whatever path measured the loss.
        assert report["verification"]["stock_load"]["largest_difference"] == 0
    first, second = (read_plan(place / how / "plan.json") for how in results)
    assert first.layers == second.layers
    assert (place / "stock" / "model.safetensors").read_bytes() == (
        place / "auto" / "model.safetensors"
    ).read_bytes()
    kl = [result["verification"]["loss"]["kl"]["value"] for result in results.values()]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_statistics_of_another_path_are_refused(place: Path) -> None:
    kept = place / "statistics.safetensors"
    corpus = read_corpus(place / "learn.jsonl")
    router = ExpertRouter.from_pretrained(place / "twins", cpu_experts="segmented")
    made = calibrate_once(router, corpus, kept, similarity=False)
    assert made.collected.cpu_experts == "segmented"
    assert calibrate_once(router, corpus, kept, similarity=False).collected == made.collected
    router.cpu_experts = "stock"
    with pytest.raises(UsageError, match="--cpu-experts segmented, now it is stock"):
        calibrate_once(router, corpus, kept, similarity=False)


def test_verify_and_frontier_take_it(place: Path) -> None:
    corpus = read_corpus(place / "test.jsonl")
    router = ExpertRouter.from_pretrained(place / "twins")
    for how, device in (("stock", "CPU in float32"), ("segmented", "CPU in float32, experts by")):
        found = verify(router, place / "twins", corpus, cpu_experts=how)
        assert found.device.startswith(device)
        assert found.loss.kl.value == 0.0
        assert router.cpu_experts == "stock"
    with pytest.raises(UsageError, match="not 'fast'"):
        frontier("demo", cpu_experts="fast")
    refused = CliRunner().invoke(app, ["frontier", "demo", "--cpu-experts", "fast"])
    assert refused.exit_code == 2
    assert "auto" in refused.output


def test_router_rows_are_trained_where_gradients_exist(place: Path) -> None:
    found = compress(
        place / "twins",
        ratio=0.25,
        method="reap",
        repair_router=2,
        calibration=place / "learn.jsonl",
        evaluation=place / "test.jsonl",
        dry_run=True,
        cpu_experts="segmented",
    )
    assert found.plan.evidence["router_repair"]["steps"] == 2
    assert found.plan.settings["cpu_experts"] == "segmented"
