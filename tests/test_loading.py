"""Names to models: what is refused, and with which sentence."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from moe_lens import ExpertRouter, MoeLensError, UnsupportedModelError, UsageError
from moe_lens.loading import load
from moe_lens.trial_run import blaming_the_model
from tiny_models import save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path / "model")


def test_a_folder_loads(folder: Path) -> None:
    model, tokenizer, config, path = load(folder)
    assert config["model_type"] == "qwen3_moe"
    assert path == folder
    assert tokenizer.encode("w3 w5") == [3, 5]
    assert model.layers


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model folder"):
        load(tmp_path / "nothing")


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a file; name the model's folder"):
        load(folder / "config.json")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(tmp_path)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MoeLensError, match="neither a folder here nor in the cache"):
        load("nobody/no-such-model")


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(MoeLensError, match="is not valid JSON"):
        load(folder)


def test_an_architecture_mlx_lm_does_not_have(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    with pytest.raises(UnsupportedModelError, match="mlx-lm has no model type 'no_such_type'"):
        load(folder)


def test_remote_code_is_not_run_unasked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load(folder)


@pytest.mark.parametrize("left", [4, 100, -10])
def test_a_truncated_shard(folder: Path, left: int) -> None:
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:left])
    with pytest.raises(MoeLensError, match="truncated or corrupt"):
        load(folder)


def test_a_shard_of_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!")
    with pytest.raises(MoeLensError, match="header is not readable"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(MoeLensError, match=r"lacks model\.safetensors"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(MoeLensError, match="there are no weights"):
        load(folder)


def test_weights_that_do_not_fit_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 16}))
    with pytest.raises(MoeLensError, match="mlx-lm cannot load"):
        load(folder)


def test_a_dense_model(tmp_path: Path) -> None:
    from mlx_lm.models.llama import Model, ModelArgs

    arguments = ModelArgs("llama", 32, 1, 64, 2, 1e-5, 100)
    with pytest.raises(UnsupportedModelError, match="llama is a dense model"):
        ExpertRouter(Model(arguments), None, {"model_type": "llama"})


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only the CPU backend needs float32")
def test_half_precision_runs_in_float32_on_the_cpu_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "half", dtype=mx.bfloat16)
    before = (folder / "model.safetensors").read_bytes()
    router = ExpertRouter.from_pretrained(folder)
    assert router.info.dtype == "bfloat16"
    assert router.notes == [record.message for record in caplog.records]
    assert "computing in float32" in router.notes[0]
    mx.eval(router.forward([1, 2, 3]))
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_that_mlx_lm_builds_but_cannot_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 255}))
    router = ExpertRouter.from_pretrained(folder)
    assert router.info.experts_per_token == 255
    for run in (lambda: router.forward([1, 2]), lambda: router.generate("w1", max_tokens=2)):
        with pytest.raises(MoeLensError, match=r"mlx-lm cannot run .*argpartition.*: its config"):
            run()


def test_a_mistake_of_ours_is_not_blamed_on_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = ExpertRouter.from_pretrained(folder)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(type(router.model), "__call__", fail)
    router.path = None
    with pytest.raises(ZeroDivisionError, match="ours"):
        router.forward([1, 2])
    monkeypatch.undo()
    router.path = folder
    with pytest.raises(ZeroDivisionError), blaming_the_model("m", folder, 2):
        fail()
