"""The written folder: complete, byte for byte where nothing changed, there whole or not at all."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard
from mlx.utils import tree_flatten
from mlx_lm.utils import load, load_model, save_model
from safetensors import safe_open

from moe_lens.compress import read_plan, write
from moe_lens.compress.checkpoint.assemble import assemble
from moe_lens.compress.checkpoint.config import smaller_config
from moe_lens.compress.checkpoint.tensor_file import write_shards
from moe_lens.compress.tensors.parameters import smaller_parameters
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.errors import MoeLensError, UsageError
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import merge_plan, prepared


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


@pytest.mark.parametrize(
    ("quantise", "dtype"), [(None, None), (None, mx.bfloat16), (4, None), (4, mx.bfloat16)]
)
def test_kept_experts_are_the_same_bytes(
    quantise: int | None, dtype: mx.Dtype | None, tmp_path: Path
) -> None:
    source, plan = prepared(tmp_path, quantise=quantise, dtype=dtype)
    before, after = tensors(source), tensors(write(plan, source, tmp_path / "smaller"))
    assert set(before) == set(after)
    for name, old in before.items():
        new = after[name]
        assert new.dtype == old.dtype
        if ".mlp." in name and old.shape[0] == 16:
            layer = plan.layer(int(name.split(".")[2]))
            assert layer is not None
            old = old[mx.array([group.experts[0] for group in layer.groups])]
        assert bytes(memoryview(old.view(mx.uint8))) == bytes(memoryview(new.view(mx.uint8)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_merging_leaves_single_experts_alone(dtype: mx.Dtype, tmp_path: Path) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source", 4, experts=16, dtype=dtype)
    router = ExpertRouter.from_pretrained(source)
    groups = [(0, 5), *[(e,) for e in range(1, 16) if e != 5]]
    plan = merge_plan(router, dict.fromkeys(router.info.moe_layers, groups))
    before, after = tensors(source), tensors(write(plan, source, tmp_path / "smaller"))
    kept = mx.array([group[0] for group in groups[1:]])
    for name, old in before.items():
        if ".mlp." in name and old.shape[0] == 16:
            assert after[name].dtype == old.dtype
            assert bool(mx.array_equal(after[name][1:], old[kept]))


def test_what_is_tried_in_memory_is_what_is_written(tmp_path: Path) -> None:
    source = save_checkpoint("gpt_oss", tmp_path / "source", 4, experts=16)
    router = ExpertRouter.from_pretrained(source)
    groups = [tuple(range(e, e + 2)) for e in range(0, 16, 2)]
    plan = merge_plan(router, dict.fromkeys(router.info.moe_layers, groups))
    plan = plan.with_experts_per_token(1)
    parent = open_parent(source)
    config = smaller_config(parent, plan)
    live = assemble(source, config, smaller_parameters(parent, plan))
    written, _ = load(str(write(plan, source, tmp_path / "smaller")))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert bool(mx.array_equal(live(tokens), written(tokens)))
    assert type(live) is type(written)


def test_the_folder_is_complete(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling.py").write_text("print('hello')")
    (source / "LICENSE").write_text("free")
    (source / ".gitattributes").write_text("x")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "pictures").mkdir()
    (source / "pictures" / "dendrogram.png").write_bytes(b"of the parent")
    for of_the_parent in ("report.json", "card.json", "training.json"):
        (source / of_the_parent).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [mlx, poems]\n---\n# The parent\n"
    )
    output = write(plan, source, tmp_path / "smaller")
    names = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    assert names == {
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling.py",
        "pictures/plan.png",
        "plan.json",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert read_plan(output / "plan.json") == plan
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["mlx", "poems", "moe-lens", "pruned-experts"]
    assert "Nothing was measured yet" in card.text
    assert str(tmp_path) not in card.content


def test_config_changes_in_two_places_only(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path, "qwen3_vl_moe")
    plan = plan.with_experts_per_token(1)
    before = json.loads((source / "config.json").read_text())
    output = write(plan, source, tmp_path / "smaller")
    after = json.loads((output / "config.json").read_text())
    text = after["text_config"]
    assert (text["num_experts"], text["num_experts_per_tok"]) == (8, 1)
    before["text_config"] |= {"num_experts": 8, "num_experts_per_tok": 1}
    # stock mlx-lm takes the end-of-text token over from generation_config.json
    assert {**before, "eos_token_id": after["eos_token_id"]} == after


def test_synonyms_and_lists_in_the_config_follow(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path, "hunyuan")
    parent = open_parent(source)
    parent.config.update(moe_topk=[2, 2], num_local_experts=16, top_k_experts=7)
    config = smaller_config(parent, plan.with_experts_per_token(1))
    assert config["moe_topk"] == [1, 1]
    assert config["num_experts"] == config["num_local_experts"] == 8
    assert config["top_k_experts"] == 7
    assert parent.config["num_experts"] == 16


def test_k_that_the_config_leaves_to_the_default_is_written_down(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    parent = open_parent(source)
    del parent.config["num_experts_per_tok"]
    assert smaller_config(parent, plan.with_experts_per_token(1))["num_experts_per_tok"] == 1


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    parent = open_parent(source)
    parent.config["num_experts"] = 12
    with pytest.raises(MoeLensError, match="does not say num_experts = 16"):
        smaller_config(parent, plan)


def test_quantisation_of_listed_experts_is_renumbered(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path, "dbrx")
    prefix = "transformer.blocks.0.ffn.experts"
    first = plan.layers[0].groups[1].experts[0]
    gone = plan.layers[0].removed[0]
    parent = open_parent(source)
    parent.config["quantization"] = {
        "bits": 4,
        "group_size": 32,
        f"{prefix}.{first}.w1": {"bits": 8, "group_size": 32},
        f"{prefix}.{gone}.w1": {"bits": 2, "group_size": 32},
    }
    assert smaller_config(parent, plan)["quantization"] == {
        "bits": 4,
        "group_size": 32,
        f"{prefix}.1.w1": {"bits": 8, "group_size": 32},
    }


def test_hugging_face_layout_is_read(tmp_path: Path) -> None:
    """One tensor for each expert, as transformers writes them, in two shards."""
    source, plan = prepared(tmp_path)
    expected = tensors(write(plan, source, tmp_path / "expected"))
    apart: dict[str, mx.array] = {}
    for name, value in tensors(source).items():
        if ".switch_mlp." in name:
            for expert in range(16):
                apart[name.replace("switch_mlp", f"experts.{expert}")] = value[expert]
        else:
            apart[name] = value
    for file in source.glob("model*"):
        file.unlink()
    names = sorted(apart)
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        shard = str(source / f"model-{number:05d}-of-00002.safetensors")
        mx.save_safetensors(shard, {name: apart[name] for name in half})
    plan = replace(plan, model=replace(plan.model, fingerprint=""))
    found = tensors(write(plan, source, tmp_path / "smaller"))
    assert set(found) == set(expected)
    assert all(bool(mx.array_equal(found[name], expected[name])) for name in found)


def test_large_models_are_sharded(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    whole = tensors(write(plan, source, tmp_path / "whole"))
    output = write(plan, source, tmp_path / "sharded", shard_bytes=100_000)
    shards = sorted(output.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert all(f"-of-{len(shards):05d}" in shard.name for shard in shards)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    found = tensors(output)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    for name, shard in index["weight_map"].items():
        with safe_open(output / shard, "np") as file:
            assert file.metadata() == {"format": "mlx"}
            np.testing.assert_array_equal(file.get_tensor(name), np.array(whole[name]))
    assert set(index["weight_map"]) == set(whole)
    load(str(output))


def test_tensor_files_hold_every_dtype(tmp_path: Path) -> None:
    values = {
        str(dtype): mx.array([[0, 1], [2, 3], [1, 0]]).astype(dtype)
        for dtype in (mx.bfloat16, mx.float16, mx.float32, mx.uint8, mx.int32, mx.bool_, mx.int64)
    }
    values |= {"scalar": mx.array(3.5), "empty": mx.zeros((0, 4)), "view": mx.arange(6)[::2]}
    write_shards(tmp_path, dict(values), 1)
    found = mx.load(str(tmp_path / "model.safetensors"))
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert bool(mx.array_equal(found[name], value))


def test_parameters_are_counted_as_mlx_lm_counts_them(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path, quantise=4)
    output = write(plan, source, tmp_path / "smaller")
    model, _ = load_model(output)
    save_model(tmp_path / "stock", model)
    ours, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (output, tmp_path / "stock")
    )
    assert ours == theirs


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    total = sum(value.nbytes for value in tensors(source).values())
    largest = max(value.nbytes for value in tensors(source).values())
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    gc.disable()  # what waits for the garbage collection must hold no tensor
    try:
        write(plan, source, tmp_path / "smaller")
    finally:
        gc.enable()
    # The tensor, what is cut from it, and the copy that is contiguous.
    assert mx.get_peak_memory() - start < 3 * largest + 200_000 < total


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    other = save_checkpoint("qwen3_moe", tmp_path / "other", experts=16, seed=7)
    with pytest.raises(UsageError, match="made from another checkpoint"):
        write(plan, other, tmp_path / "smaller")
    unbound = replace(plan, model=replace(plan.model, fingerprint=""))
    small = save_checkpoint("qwen3_moe", tmp_path / "small")
    with pytest.raises(UsageError, match="a model with 16 rows"):
        write(unbound, small, tmp_path / "smaller")
    mixtral = save_checkpoint("mixtral", tmp_path / "mixtral", experts=16)
    with pytest.raises(UsageError, match=r"for the layers \[1, 2\], but this model routes in \[0"):
        write(unbound, mixtral, tmp_path / "smaller")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mixtral",
        "other",
        "small",
        "source",
    ]
    assert write(plan, source, tmp_path / "smaller").is_dir()


def test_live_parameters_are_let_go(tmp_path: Path) -> None:
    source, _ = prepared(tmp_path)
    parent = open_parent(source)
    taken = parent.take_parameters()
    assert sum(value.nbytes for value in taken.values()) == parent.size.bytes
    left = [value.size for _, value in tree_flatten(parent.model.parameters())]
    assert set(left) == {1}


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    seen: list[tuple[int, int]] = []
    output = write(plan, source, tmp_path / "a", progress=lambda *each: seen.append(each))
    assert seen[-1][0] == seen[-1][1] == sum(v.nbytes for v in tensors(output).values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("part", ["switch_mlp.up_proj.weight", "gate.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_damaged_experts_and_routers_are_not_written(part: str, bad: float, tmp_path: Path) -> None:
    source, plan = prepared(tmp_path, dtype=mx.bfloat16)
    weights = source / "model.safetensors"
    content = dict(tensors(source))
    name = f"model.layers.1.mlp.{part}"
    kept = plan.layers[0].groups[2].experts[0]
    content[name] = content[name] * 1
    content[name][kept, ..., 3] = bad
    mx.eval(list(content.values()))
    mx.save_safetensors(str(weights), content, {"format": "mlx"})
    plan = replace(plan, model=replace(plan.model, fingerprint=""))
    with pytest.raises(MoeLensError, match=f"{name} holds NaN or infinity, so the model is damag"):
        write(plan, source, tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_a_parent_that_changes_while_it_is_written_from(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)

    def change(done: int, total: int) -> None:
        os.utime(source / "model.safetensors", ns=(0, done))

    with pytest.raises(MoeLensError, match=r"changed while it was read \(model\.safetensors\)"):
        write(plan, source, tmp_path / "smaller", progress=change)
    assert not (tmp_path / "smaller").exists()


def test_links_of_the_parent_lead_out_of_nowhere_else(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    (source / "notes.txt").symlink_to(private / "key")
    (source / "lost.txt").symlink_to("nothing")
    (source / "alias.txt").symlink_to("tokenizer.json")
    (source / "additional_chat_templates").symlink_to(private)
    (source / "tokenizer.json").rename(private / "tokenizer.json")
    (source / "tokenizer.json").symlink_to(private / "tokenizer.json")
    os.mkfifo(source / "pipe")
    said: list[str] = []
    output = write(plan, source, tmp_path / "smaller", say=said.append)
    assert (output / "tokenizer.json").read_bytes() == (private / "tokenizer.json").read_bytes()
    assert not {"notes.txt", "lost.txt", "pipe", "alias.txt"} & {f.name for f in output.iterdir()}
    assert any("notes.txt is not copied: it is a link out of" in each for each in said)
    assert any("lost.txt is not copied: it is a link to nothing" in each for each in said)
    assert any("pipe is not copied: it is no plain file" in each for each in said)
    assert not any(file.is_symlink() for file in output.rglob("*"))


def test_the_cache_of_the_hub_is_copied_as_files(tmp_path: Path) -> None:
    source, plan = prepared(tmp_path)
    (source / "LICENSE").write_text("free")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    output = write(plan, snapshot, tmp_path / "smaller")
    assert (output / "LICENSE").read_text() == "free"
    assert not any(file.is_symlink() for file in output.rglob("*"))
    load(str(output))
