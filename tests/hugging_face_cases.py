"""What the tests of ``format="hf"`` share: parents in either layout, and how they are read."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from moe_lens.compress import Plan
from moe_lens.compress.checkpoint.checkpoint import write_checkpoint
from moe_lens.compress.checkpoint.same_parameters import check_same_parameters
from moe_lens.compress.tensors.parent import Parent
from moe_lens.router import ExpertRouter
from tiny_models import save_checkpoint
from twins import kept_per_layer, merge_plan, prune_plan


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


def opened(folder: Path) -> ExpertRouter:
    model, config = load_model(folder)
    return ExpertRouter(model, None, config, path=folder)


def write(plan: Plan, source: Path, folder: Path, format: str = "hf") -> Path:
    """What `moe_lens.compress.write` does for a model without a tokenizer."""
    model, config = load_model(source, lazy=True)
    folder.mkdir()
    write_checkpoint(Parent.of(model, None, config, source), plan, folder, format=format)
    if format == "hf":
        check_same_parameters(folder, source, plan)
    return folder


def pruned(source: Path, keep: int) -> Plan:
    router = opened(source)
    return prune_plan(router, kept_per_layer(router, keep))


def in_pairs(source: Path) -> Plan:
    router = opened(source)
    pairs = [(e, e + 1) for e in range(0, router.layers[0].num_experts, 2)]
    return merge_plan(router, {layer.index: pairs for layer in router.layers})


def exported(name: str, folder: Path, dtype: mx.Dtype | None = None) -> Path:
    """A tiny model of 8 experts in the layout of Hugging Face."""
    source = save_checkpoint(name, folder / "mlx", experts=16, dtype=dtype)
    return write(pruned(source, 8), source, folder / "hf")


def stored_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor, as the files say."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            start, stop = (8 + length + each for each in entry["data_offsets"])
            found[name] = (entry["dtype"], content[start:stop])
    return found


def rewrite(folder: Path, changed: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    """Change the tensors of a folder."""
    found = {name: mx.array(value) for name, value in tensors(folder).items()}
    mx.eval(found)
    found = changed(found)
    for file in folder.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), found, {"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def parameters(folder: Path) -> dict[str, mx.array]:
    """What stock mlx-lm reads of a folder."""
    found: dict[str, mx.array] = dict(tree_flatten(load_model(folder, lazy=True)[0].parameters()))
    return found


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    """Whether two sets of tensors have the same names, dtypes and bits."""
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype and bool(mx.array_equal(a[name], b[name])) for name in a
    )


def gpt_oss(folder: Path) -> Path:
    """gpt-oss converted for MLX with nothing but its experts packed."""
    source = save_checkpoint("gpt_oss", folder, experts=16, dtype=mx.bfloat16)
    model, config = load_model(source)
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(
            model, config, 32, 4, mode="mxfp4", quant_predicate=lambda path, _: ".experts." in path
        )
    save_model(source, model, donate_model=True)
    save_config(config, source / "config.json")
    return source
