"""What mlx-lm drops of the parent: towers go along byte for byte, prediction heads do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from moe_lens.checkpoint_files.folder import INDEX, open_tensors, stored_tensors, weight_files
from moe_lens.compress import write
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import Shape, SizeTable
from moe_lens.compress.tensors.unread import find_unread
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import kept_per_layer, prune_plan

TOKENS = mx.array([[1, 5, 9, 3, 7]])

TOWERS = {
    "qwen3_vl_moe": ("visual.blocks.0.attn", "model.visual.merger"),
    "qwen3_5_moe": ("vision_tower.blocks.0.attn", "model.visual.merger"),
    "gemma4": ("vision_tower.layers.40.attn", "embed_vision.projection", "audio_tower.norm"),
    "kimi_vl": ("vision_tower.encoder.blocks.30.attn", "multi_modal_projector.linear_1"),
    "kimi_k25": ("vision_tower.encoder.blocks.0.attn", "mm_projector.proj"),
    "llama4": ("vision_model.model.layers.33.attn", "multi_modal_projector.linear_1"),
    "minimax_m3_vl": ("vision_tower.layers.0.attn", "patch_merge_mlp.linear"),
    "kimi_k3": ("vision_tower.blocks.0.attn", "mm_projector.proj"),
}

HEADS = {
    "glm4_moe": "model.layers.3.mlp.experts.0.gate_proj",
    "glm4_moe_lite": "model.layers.4.eh_proj",
    "deepseek_v3": "model.layers.61.shared_head.norm",
    "qwen3_5_moe": "mtp.fc",
    "exaone_moe": "mtp.norm",
    "mimo_v2_flash": "model.mtp.layers.0.norm",
    "longcat_flash": "model.mtp.layers.0.norm",
    "nemotron_h": "mtp.layers.0.mixer",
    "step3p5": "model.layers.45.transformer.norm",
}


def add(folder: Path, names: tuple[str, ...], size: int = 96) -> dict[str, mx.array]:
    """Put further tensors into the files of a checkpoint."""
    more: dict[str, mx.array] = {}
    for number, name in enumerate(names):
        more[f"{name}.weight"] = mx.arange(size + number).astype(mx.bfloat16)
        more[f"{name}.bias"] = mx.arange(7) + number
    mx.save_safetensors(str(folder / "model-more.safetensors"), more)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(more, "model-more.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    return more


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def smaller(name: str, folder: Path, notes: list[str]) -> tuple[Path, Path]:
    source = folder / "source"
    router = ExpertRouter.from_pretrained(source)
    plan = prune_plan(router, kept_per_layer(router, 8))
    return source, write(plan, source, folder / "smaller", say=notes.append)


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_carried_along(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source", experts=16)
    expected, _ = load_model(source)
    more = add(source, TOWERS[name])
    notes: list[str] = []
    _, output = smaller(name, tmp_path, notes)
    found = stored_tensors(output)
    after = open_tensors(weight_files(output))
    for tensor, value in more.items():
        assert found[tensor].shape == value.shape
        assert bool(mx.array_equal(after[tensor], value))
    index = json.loads((output / INDEX).read_text())["weight_map"]
    assert set(index) == set(found)
    assert len(notes) == 1
    assert f"({len(more)} tensors" in notes[0]
    assert "carried along as it is" in notes[0]
    assert notes == json.loads((output / "report.json").read_text())["notes"]
    assert "carried along as it is" in (output / "README.md").read_text()
    model, _ = load_model(output)  # stock mlx-lm drops them again
    assert model(TOKENS).shape == expected(TOKENS).shape


@pytest.mark.parametrize("name", HEADS)
def test_prediction_heads_are_left_out(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source", experts=16)
    more = add(source, (HEADS[name],))
    change_config(source, num_nextn_predict_layers=1, mtp_num_hidden_layers=2)
    notes: list[str] = []
    source, output = smaller(name, tmp_path, notes)
    assert not set(more) & set(stored_tensors(output))
    config = json.loads((output / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == config["mtp_num_hidden_layers"] == 0
    assert len(notes) == 1
    assert "the head that predicts further tokens" in notes[0]
    assert notes == json.loads((output / "report.json").read_text())["notes"]
    assert "the head that predicts further tokens" in (output / "README.md").read_text().lower()
    load_model(output)


class _KeepsAllBesideItsOwnNames:
    """A model that tells its two layouts apart by one name, as DeepSeek-V4's port does."""

    def __init__(self) -> None:
        self.layers = [None]

    def parameters(self) -> dict[str, Any]:
        return {"model": {"norm": mx.ones(2)}}

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if any(name.startswith("model.") for name in weights):
            return weights
        return {f"model.{name}": v for name, v in weights.items() if not name.startswith("vision")}


def test_a_tower_that_would_not_be_dropped_beside_the_names_of_mlx_lm(tmp_path: Path) -> None:
    tensors = {"norm": mx.ones(2), "vision.a": mx.ones(3)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    unread = find_unread(_KeepsAllBesideItsOwnNames(), tmp_path)
    assert [each.name for each in unread.stranded] == ["vision.a"]
    assert unread.towers == ()
    assert "vision (1 tensor) is left out" in unread.notes("mlx")[0]
    assert "vision (1 tensor), 1.2e-05 MB, is carried along" in unread.notes("hf")[0]


def test_bytes_that_go_along_count(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_vl_moe", tmp_path / "source", experts=16)
    before = SizeTable.of(open_parent(source)).fixed
    more = add(source, TOWERS["qwen3_vl_moe"], 50_000)
    table = SizeTable.of(open_parent(source))
    assert table.fixed >= before + sum(value.nbytes for value in more.values())
    _, output = smaller("qwen3_vl_moe", tmp_path, [])
    written = sum(file.stat().st_size for file in weight_files(output))
    assert written <= table.bytes(Shape(8, table.full.expert_width))
    assert table.bytes(Shape(8, table.full.expert_width)) - written < 20_000


def test_fp8_towers_keep_their_dtype(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_vl_moe", tmp_path / "source", experts=16)
    data = bytes(range(64))
    header = {"visual.a": {"dtype": "F8_E4M3", "shape": [8, 8], "data_offsets": [0, 64]}}
    text = json.dumps(header).encode()
    (source / INDEX).unlink()
    shard = source / "model-fp8.safetensors"
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    _, output = smaller("qwen3_vl_moe", tmp_path, [])
    found = stored_tensors(output)["visual.a"]
    assert (found.dtype, found.shape) == ("F8_E4M3", (8, 8))
    assert found.file.read_bytes()[found.start : found.start + found.size] == data


def test_models_without_such_tensors_say_nothing(tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", experts=16)
    unread = open_parent(source).unread
    assert unread.notes("mlx") == []
    assert not (unread.towers or unread.heads or unread.stranded)
