"""``format="hf"`` of parents in the layout of Hugging Face: what is moved keeps its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from hugging_face_cases import (
    change_config,
    exported,
    gpt_oss,
    in_pairs,
    parameters,
    pruned,
    rewrite,
    same,
    stored_bytes,
    tensors,
    write,
)
from moe_lens import compress
from moe_lens.compress.hugging_face import layouts
from moe_lens.errors import UnsupportedModelError
from tiny_models import save_checkpoint

OWN_NAMES_OF_DEEPSEEK = {
    "lm_head.": "head.",
    "model.embed_tokens.": "embed.",
    ".self_attn.": ".attn.",
    ".mlp.": ".ffn.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".attn_hc.": ".hc_attn_",
    ".ffn_hc.": ".hc_ffn_",
    ".sinks": ".attn_sink",
    ".q_a_proj.": ".wq_a.",
    ".q_b_proj.": ".wq_b.",
    ".attn.kv_proj.": ".attn.wkv.",
    ".o_a_proj.": ".wo_a.",
    ".o_b_proj.": ".wo_b.",
    ".q_a_norm.": ".q_norm.",
    ".gate.e_score_correction_bias": ".gate.bias",
    ".shared_experts.gate_proj.": ".shared_experts.w1.",
    ".shared_experts.down_proj.": ".shared_experts.w2.",
    ".shared_experts.up_proj.": ".shared_experts.w3.",
}
"""What its published checkpoint calls what mlx-lm calls otherwise."""


def fp8_parent(folder: Path) -> Path:
    """DeepSeek-V3 as it is on the hub: experts in fp8 with block scales, and a prediction head."""
    source = exported("deepseek_v3", folder, mx.bfloat16)

    def packed(found: dict[str, mx.array]) -> dict[str, mx.array]:
        for name in [name for name in found if ".mlp.experts." in name]:
            scale = mx.array([[0.5]])
            found[name] = mx.to_fp8(found[name] / 0.5)
            found[f"{name}_scale_inv"] = scale
        head = {n: v for n, v in found.items() if n.startswith("model.layers.2.")}
        return found | {n.replace("layers.2.", "layers.61."): v for n, v in head.items()}

    rewrite(source, packed)
    file = source / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if entry.get("dtype") == "U8":
            entry["dtype"] = "F8_E4M3"
        assert name
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    change_config(
        source,
        num_nextn_predict_layers=1,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    return source


def test_fp8_stays_fp8_and_heads_go(tmp_path: Path) -> None:
    source = fp8_parent(tmp_path)
    (source / "hf_quant_config.json").write_text("{}")
    plan = pruned(source, 4)
    there = write(plan, source, tmp_path / "there")
    assert (there / "hf_quant_config.json").read_text() == "{}"
    stayed = write(plan, source, tmp_path / "stayed", "mlx")
    assert not (stayed / "hf_quant_config.json").exists()
    before, after = stored_bytes(source), stored_bytes(there)
    kinds = {kind for name, (kind, _) in after.items() if name.endswith("proj.weight")}
    assert kinds == {"BF16", "F8_E4M3"}
    layer = plan.layer(2)
    assert layer is not None
    for number, group in enumerate(layer.groups):
        for leaf in ("weight", "weight_scale_inv"):
            place = "model.layers.2.mlp.experts.{}.up_proj." + leaf
            assert after[place.format(number)] == before[place.format(group.experts[0])]
    assert any("layers.61." in name for name in before)
    assert not any("layers.61." in name for name in after)
    config = json.loads((there / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert config["n_routed_experts"] == 4
    assert config["quantization_config"]["quant_method"] == "fp8"


def test_fp8_experts_are_not_merged(tmp_path: Path) -> None:
    source = fp8_parent(tmp_path)
    with pytest.raises(UnsupportedModelError, match="remove experts only") as caught:
        write(in_pairs(source), source, tmp_path / "there")
    assert "weight_scale_inv" in str(caught.value)


def test_int4_stays_int4(tmp_path: Path) -> None:
    """As Kimi-K2 is stored: packed words, their scales, and the shape that they unpack to."""
    source = exported("deepseek_v3", tmp_path, mx.bfloat16)

    def packed(found: dict[str, mx.array]) -> dict[str, mx.array]:
        for name in [name for name in found if ".mlp.experts." in name]:
            rows, columns = found.pop(name).shape
            words = mx.random.randint(0, 1 << 30, (rows, columns // 8))
            scales = mx.random.uniform(0.01, 0.02, (rows, columns // 32))
            found[f"{name}_packed"] = words.astype(mx.int32)
            found[f"{name}_scale"] = scales.astype(mx.bfloat16)
            found[f"{name}_shape"] = mx.array([rows, columns], mx.int32)
        return found

    rewrite(source, packed)
    quantisation = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    change_config(source, quantization_config=quantisation)
    plan = pruned(source, 4)
    there = write(plan, source, tmp_path / "there")
    before, after = stored_bytes(source), stored_bytes(there)
    layer = plan.layer(2)
    assert layer is not None
    for number, group in enumerate(layer.groups):
        for leaf in ("weight_packed", "weight_scale", "weight_shape"):
            place = "model.layers.2.mlp.experts.{}.up_proj." + leaf
            assert after[place.format(number)] == before[place.format(group.experts[0])]
    config = json.loads((there / "config.json").read_text())
    assert config["quantization_config"] == quantisation
    with pytest.raises(
        UnsupportedModelError, match=r"they have experts\.0\.down_proj\.weight_packed"
    ):
        write(in_pairs(source), source, tmp_path / "merged")


@pytest.mark.parametrize("how", [{"threshold": 0.5}, {"ratio": 0.5}, {"expert_width": 0.5}])
def test_what_fp8_cannot_hold_is_refused_before_anything_runs(
    how: dict[str, float], tmp_path: Path
) -> None:
    source, began = fp8_parent(tmp_path), []
    with pytest.raises(UnsupportedModelError, match="remove experts only"):
        compress.compress(
            source,
            **how,
            format="hf",
            output=tmp_path / "there",
            progress=lambda *each: began.append(each),
        )
    assert not began
    assert not (tmp_path / "there").exists()


def test_a_vision_tower_comes_along(tmp_path: Path) -> None:
    source = exported("gemma4", tmp_path)
    tower = {"model.vision_tower.encoder.layers.0.mlp.gate.weight": mx.ones((8, 3))}
    rewrite(source, lambda found: found | tower)
    there = write(pruned(source, 4), source, tmp_path / "there")
    name = next(iter(tower))
    assert stored_bytes(there)[name] == stored_bytes(source)[name]


def test_what_mlx_lm_drops_follows_the_experts(tmp_path: Path) -> None:
    """Ernie's correction of the selection, which mlx-lm does not read."""
    source = exported("ernie4_5_moe", tmp_path)
    name = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"
    numbers = mx.arange(8).reshape(1, 8).astype(mx.float32)
    rewrite(source, lambda found: found | {name.format(layer): numbers for layer in (1, 2)})
    plan = pruned(source, 4)
    after = tensors(write(plan, source, tmp_path / "there"))
    for layer in (1, 2):
        planned = plan.layer(layer)
        assert planned is not None
        kept = [group.experts[0] for group in planned.groups]
        assert after[name.format(layer)].tolist() == [kept]
    with pytest.raises(UnsupportedModelError, match="mlx-lm does not read it"):
        write(in_pairs(source), source, tmp_path / "merged")


@pytest.mark.parametrize("name", ["hunyuan", "kimi_k3"])
def test_parents_that_are_there_already(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types that the converter does not leave a way back for, and mlx-lm reads experts apart of."""
    with monkeypatch.context() as patch:
        patch.setitem(layouts.LAYOUTS, name, replace(layouts.LAYOUTS[name], lost=None))
        source = exported(name, tmp_path)
    assert any(".experts.7." in each for each in tensors(source))
    for plan, folder in ((pruned(source, 4), "pruned"), (in_pairs(source), "merged")):
        there = write(plan, source, tmp_path / folder)
        assert set(tensors(there)) < set(tensors(source))


def test_names_of_the_first_checkpoints(tmp_path: Path) -> None:
    """DeepSeek's own names, which have no prefix and another word for nearly everything."""
    source = save_checkpoint("deepseek_v41", tmp_path / "mlx")
    model = load_model(source)[0]

    def renamed(found: dict[str, mx.array]) -> dict[str, mx.array]:
        made = {}
        for name, value in found.items():
            place, _, projection = name.partition(".mlp.experts.switch_mlp.")
            for old, new in OWN_NAMES_OF_DEEPSEEK.items():
                name = name.replace(old, new)
            name = name.removeprefix("model.")
            value = value.flatten(0, 1) if name.endswith("wo_a.weight") else value
            if not projection:
                made[name] = value
                continue
            own = layouts.W123.names[projection.removesuffix(".weight")]
            block = f"{place.removeprefix('model.')}.ffn"
            made |= {f"{block}.experts.{e}.{own}.weight": value[e] for e in range(len(value))}
        return made

    expected = dict(tree_flatten(model.parameters()))
    rewrite(source, renamed)
    assert same(parameters(source), expected)
    tied = {f"layers.{layer}.ffn.gate.bias_vl": mx.arange(8) * 1.0 for layer in range(3)}
    rewrite(source, lambda found: found | tied)
    plan = pruned(source, 4)
    after = tensors(write(plan, source, tmp_path / "there"))
    assert set(after) < set(tensors(source))
    for layer, planned in enumerate(plan.layers):
        kept = [group.experts[0] for group in planned.groups]
        assert after[f"layers.{layer}.ffn.gate.bias_vl"].tolist() == kept


def test_gpt_oss_keeps_its_blocks(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "mlx")
    there = write(pruned(source, 8), source, tmp_path / "there")
    found = tensors(there)
    blocks = found["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    assert (blocks.dtype, blocks.shape) == (mx.uint8, (8, 128, 2, 16))
    assert found["model.layers.0.mlp.experts.gate_up_proj_scales"].shape == (8, 128, 2)
    config = json.loads((there / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert "quantization" not in config
    plan = pruned(there, 4)
    smaller = write(plan, there, tmp_path / "smaller")
    layer = plan.layer(1)
    assert layer is not None
    rows = mx.array([group.experts[0] for group in layer.groups])
    for name, value in tensors(smaller).items():
        if "layers.1.mlp.experts." in name:
            assert bool(mx.array_equal(value, found[name][rows]))
    write(in_pairs(there), there, tmp_path / "merged")


def test_joined_projections_and_gates_stay_as_they_are(tmp_path: Path) -> None:
    """Muse Spark, of which the converter joins and folds what mlx-lm reads apart."""
    source = save_checkpoint("muse_spark", tmp_path / "mlx")
    text = json.loads((source / "config.json").read_text())["text_config"]
    heads = [text[f"num_{kind}_heads"] * text["head_dim"] for kind in ("attention", "key_value")]

    def apart(found: dict[str, mx.array]) -> dict[str, mx.array]:
        made = {}
        for name, value in found.items():
            place, _, last = name.rpartition(".mlp.experts.")
            if "qkvg_proj" in name:
                cuts = [heads[0], sum(heads), heads[0] + 2 * heads[1]]
                for each, part in zip("qkv", mx.split(value, cuts), strict=False):
                    made[name.replace("qkvg", each)] = part
                made[name.replace("qkvg", "gate")] = mx.split(value, cuts)[3]
            elif last == layouts.GATE:
                stack = [value, found[f"{place}.mlp.experts.{layouts.UP}"]]
                made[f"{place}.mlp.experts.gate_up_proj"] = mx.concatenate(stack, axis=1)
            elif last == layouts.DOWN:
                made[name.removesuffix(".weight")] = value
            elif name.endswith("_alpha"):
                kind = "attention" if "attn" in name else "feedforward"
                place = name.rpartition(".")[0]
                made[f"{place}.post_{kind}_residual_gate.gate"] = value
            elif last != layouts.UP and not name.endswith("_beta"):
                made[name] = value
        return made

    rewrite(source, apart)
    for plan, folder in ((pruned(source, 4), "pruned"), (in_pairs(source), "merged")):
        there = write(plan, source, tmp_path / folder)
        assert set(tensors(there)) == set(tensors(source))
        stack = tensors(there)["model.language_model.layers.1.mlp.experts.gate_up_proj"]
        assert stack.shape == (4, 128, 32)
