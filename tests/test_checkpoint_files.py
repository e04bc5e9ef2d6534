"""Model folders that cannot be right are refused before anything is built from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from moe_lens import MoeLensError
from moe_lens.checkpoint_files.config import check_counts, read_config
from moe_lens.checkpoint_files.finite import damaged_tensor, is_finite
from moe_lens.checkpoint_files.folder import check_weights, open_tensors, stored_tensors
from moe_lens.checkpoint_files.header import read_header
from moe_lens.checkpoint_files.unchanged import FolderState
from moe_lens.loading import load
from tiny_models import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def write_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, *, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def test_a_header_says_where_the_bytes_are(tmp_path: Path) -> None:
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(3, dtype=np.int64)}
    path = tmp_path / "some.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(value) for name, value in values.items()})
    found = read_header(path)
    content = path.read_bytes()
    assert set(found) == set(values)
    for name, value in values.items():
        stored = found[name]
        assert stored.shape == value.shape
        assert content[stored.start : stored.start + stored.size] == value.tobytes()


DAMAGED = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' and 'a' overlap"),
    "one place for two": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlap"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 bytes before 'b' are no one's"),
    "a gap at the start": ({"a": entry(4, 8)}, 8, "4 bytes before 'a'"),
    "bytes at the end": ({"a": entry(0, 4)}, 9, "5 bytes at its end are no one's"),
    "bytes missing": ({"a": entry(0, 400)}, 300, "100 bytes are missing"),
    "a shape too large": ({"a": entry(0, 8, shape=[3])}, 8, "'a' would need 12 bytes"),
    "an endless shape": ({"a": entry(0, 0, shape=[0, 10**30])}, 0, "no possible shape"),
    "a shape of texts": ({"a": entry(0, 8, shape=["2"])}, 8, "no possible shape"),
    "a truth as size": ({"a": entry(0, 4, shape=[True])}, 4, "no possible shape"),
    "negative": ({"a": entry(0, 8, shape=[-1, -2])}, 8, "no possible shape"),
    "backwards": ({"a": entry(8, 0, shape=[2])}, 8, "no possible place"),
    "an unknown dtype": ({"a": entry(0, 8, dtype="F99")}, 8, "unknown dtype 'F99'"),
    "a dtype that is no text": ({"a": entry(0, 8) | {"dtype": [1]}}, 8, "unknown dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "does not say what 'a' is"),
    "no object": ({"a": 3}, 8, "does not say what 'a' is"),
    "a list": ([1, 2], 0, "not readable"),
    "a number": (b"7", 0, "not readable"),
    "not JSON": (b"{", 0, "not readable"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not readable"),
    "nested without end": (b"[" * 100_000, 0, "not readable"),
    "one name twice": (b'{"a":1,"a":2}', 0, "names 'a' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "metadata"),
    "a name of control characters": ({"\x1b[2J": 3}, 0, r"'\\x1b\[2J'"),
    "half a character as name": ({"\ud800": 3}, 0, r"'\\ud800'"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_headers_that_contradict_themselves(what: str, tmp_path: Path) -> None:
    header, size, words = DAMAGED[what]
    path = write_file(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(MoeLensError, match=words) as refused:
        read_header(path)
    assert "\n" not in str(refused.value)
    str(refused.value).encode()
    if what not in ("metadata of numbers", "an endless shape", "one name twice"):
        with pytest.raises((SafetensorError, TypeError)), safe_open(path, "np"):
            pass  # the format's own reader agrees


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"1234", "header is cut off"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header is cut off"),
    ],
)
def test_files_that_are_no_tensors(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MoeLensError, match=words):
        check_weights(tmp_path)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # takes no room
    with pytest.raises(MoeLensError, match="its header has 200 MB, the format allows 100"):
        check_weights(tmp_path)


@pytest.mark.parametrize("dtype", ["F64", "F8_E5M2"])
def test_dtypes_that_mlx_does_not_read(dtype: str, tmp_path: Path) -> None:
    size = 8 if dtype == "F64" else 1
    header = {"a": entry(0, size, shape=[1], dtype=dtype)}
    path = write_file(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(MoeLensError, match=f"'a' in .* is {dtype}, which MLX does not read"):
        check_weights(tmp_path)
    with pytest.raises(RuntimeError):
        mx.load(str(path))


def shards(folder: Path) -> None:
    """The tiny model in two shards with an index."""
    whole = folder / "model.safetensors"
    tensors = open_tensors([whole])
    mx.eval(list(tensors.values()))
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), {each: tensors[each] for each in part})
        weight_map |= dict.fromkeys(part, name)
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_and_their_index_agree(folder: Path) -> None:
    before = {name: (each.shape, each.dtype) for name, each in stored_tensors(folder).items()}
    shards(folder)
    after = {name: (each.shape, each.dtype) for name, each in stored_tensors(folder).items()}
    assert before == after


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    changed = change(content["weight_map"])
    path.write_text(json.dumps(content if changed is None else changed))


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda named: named.update(extra=SECOND), "places 'extra' in .* does not hold it"),
        (lambda named: named.update({min(named): SECOND}), "which does not hold it"),
        (lambda named: named.pop(min(named)) and None, "which the index of .* does not name"),
        (lambda named: named.update(a="model-3.safetensors"), r"lacks model-3\.safetensors"),
        (lambda named: named.update(a="m1", b="m2", c="m3"), "lacks m1 and 2 more"),
        (lambda named: named.update(a=7), "not a readable index"),
        (lambda named: [], "not a readable index"),
        (lambda named: {"weight_map": []}, "not a readable index"),
        (lambda named: {}, "not a readable index"),
        (lambda named: named.update(a=""), "no plain file name"),
    ],
)
def test_an_index_that_contradicts_the_shards(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    shards(folder)
    change_index(folder, change)
    with pytest.raises(MoeLensError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "a\\b", "a\0b", "a\nb", "x" * 300],
)
def test_an_index_that_points_elsewhere(folder: Path, name: str) -> None:
    shards(folder)
    change_index(folder, lambda named: named.update(a=name))
    with pytest.raises(MoeLensError, match="no plain file name: take the model from a place"):
        load(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-old.safetensors")
    with pytest.raises(MoeLensError, match=r"stands in model-old\.safetensors and in model\.saf"):
        load(folder)


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(MoeLensError, match="is no file"):
        load(folder)


def test_links_are_followed_as_the_cache_of_the_hub_needs_it(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    load(snapshot, lazy=True)
    (blobs / os.readlink(snapshot / "model.safetensors").rpartition("/")[2]).unlink()
    with pytest.raises(MoeLensError, match=r"lacks model\.safetensors"):
        load(snapshot, lazy=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "names no model_type"),
        (b"{}", "names no model_type"),
        (b'{"model_type": ["a"]}', "names no model_type"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"model_type": "a", "b": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_configs_that_are_none(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(MoeLensError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e18},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": None},
        {"num_hidden_layers": "3"},
        {"num_experts": 10**12},
        {"num_experts": 0},
        {"num_experts": 2.5},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**7},
        {"rope_scaling": 7},
        {"vocab_size": []},
        {"quantization": {}},
        {"quantization": 4},
    ],
    ids=str,
)
def test_configs_with_nonsense_numbers(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(MoeLensError) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_layers_are_counted_by_the_tensors(folder: Path) -> None:
    config = read_config(folder)
    count = len(stored_tensors(folder))
    check_counts(folder, config, count)
    nested = {"model_type": "x", "text_config": {"n_layers": count + 1}}
    with pytest.raises(MoeLensError, match=f"says n_layers = {count + 1}, but the weight files"):
        check_counts(folder, nested, count)


@pytest.mark.parametrize("what", ["weights", "config", "gone", "new", "replaced"])
def test_a_folder_that_changes_is_noticed(folder: Path, what: str) -> None:
    state = FolderState.of(folder)
    state.check()
    weights = folder / "model.safetensors"
    if what == "weights":
        with weights.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"x")
    elif what == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    elif what == "gone":
        weights.unlink()
    elif what == "new":
        shutil.copy(weights, folder / "model-2.safetensors")
    else:
        times = weights.stat()
        shutil.copy(weights, folder / "other")
        (folder / "other").replace(weights)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(MoeLensError, match="changed while it was read"):
        state.check()


def test_a_folder_that_vanishes(folder: Path) -> None:
    state = FolderState.of(folder)
    shutil.rmtree(folder)
    with pytest.raises(MoeLensError, match="cannot be read any more"):
        state.check()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_found_anywhere(dtype: str, bad: float) -> None:
    kind = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype]
    largest = float(mx.finfo(kind).max)
    for size in (1, 7, 1_100_000):
        values = mx.full((size,), -largest, kind)
        assert is_finite("a", dtype, memoryview(values.view(mx.uint8)))
        for place in (0, size // 2, size - 1):
            values = mx.full((size,), largest, kind)
            values[place] = bad
            assert not is_finite("a", dtype, memoryview(values.view(mx.uint8)))
    assert is_finite("a", dtype, b"")


def test_scales_of_bytes_have_a_nan_of_their_own() -> None:
    assert not is_finite("w.scales", "U8", bytes([127, 255]))
    assert is_finite("w.scales", "U8", bytes([127, 254]))
    assert is_finite("w.weight", "U8", bytes([127, 255]))


def test_the_damaged_tensor_is_named(folder: Path) -> None:
    assert damaged_tensor(folder) is None
    weights = folder / "model.safetensors"
    tensors = open_tensors([weights])
    name = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1
    tensors[name][3, 5, 7] = float("nan")
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(weights), tensors)
    found = damaged_tensor(folder)
    assert found is not None
    assert found.name == name
