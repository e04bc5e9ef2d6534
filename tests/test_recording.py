"""Recording a real (tiny) model: against a plain capture, interrupted, batched and sampled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from moe_lens.corpus import Corpus, Prompt
from moe_lens.corpus.batches import pad, plan_batches, plan_shards
from moe_lens.errors import CaptureError, UsageError
from moe_lens.fingerprint import weights_sha256
from moe_lens.profile import Profile
from moe_lens.recording import record_profile, record_prompt, record_trace
from moe_lens.recording.recorders import ProfileRecorder
from moe_lens.router import ExpertRouter
from moe_lens.trace import NO_EXPERT, Routes, Trace
from tiny_models import build, save_checkpoint

LENGTHS = (3, 0, 9, 1, 12, 6, 6, 2, 15, 4)


def words(length: int, seed: int) -> str:
    return " ".join(f"w{(7 * seed + 13 * place) % 100}" for place in range(length))


CORPUS = Corpus(
    "lines",
    tuple(
        Prompt(text=words(length, seed), label=(None, "even", "odd")[seed % 3])
        for seed, length in enumerate(LENGTHS)
    ),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def router(checkpoint: Path) -> Iterator[ExpertRouter]:
    with ExpertRouter.from_pretrained(checkpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(router: ExpertRouter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of several shards that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    record_trace(router, CORPUS, folder, shard_tokens=12, batch_size=2)
    assert len(list(folder.glob("shard-*"))) >= 4
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything(trace: Trace) -> Routes:
    return Routes.concatenate(list(trace.shards()))


class TestBatches:
    @pytest.mark.parametrize("shard_tokens", [1, 5, 20, 10_000])
    def test_shards_cover_all_prompts_in_order(self, shard_tokens: int) -> None:
        shards = plan_shards(LENGTHS, shard_tokens)
        assert [index for shard in shards for index in shard] == list(range(len(LENGTHS)))
        sizes = [sum(LENGTHS[index] for index in shard) for shard in shards]
        longest = [max(LENGTHS[index] for index in shard) for shard in shards]
        assert all(size > 0 for size in sizes)
        assert all(s <= max(shard_tokens, n) for s, n in zip(sizes, longest, strict=True))

    def test_empty_prompts_never_make_an_empty_shard(self) -> None:
        assert plan_shards((9, 0, 0, 9, 0), 5) == [range(3), range(3, 5)]

    @pytest.mark.parametrize(("size", "tokens"), [(1, 99), (3, 99), (8, 24)])
    def test_batches_hold_every_prompt_once(self, size: int, tokens: int) -> None:
        batches = list(plan_batches(range(10), LENGTHS, size, tokens))
        assert sorted(i for batch in batches for i in batch) == [0, *range(2, 10)]
        for batch in batches:
            longest = max(LENGTHS[index] for index in batch)
            assert len(batch) == 1 or (len(batch) <= size and len(batch) * longest <= tokens)

    def test_padding(self) -> None:
        padded, lengths = pad([np.array([1, 2, 3]), np.array([4])])
        assert padded.tolist() == [[1, 2, 3], [4, 0, 0]] and lengths == [3, 1]


class TestTrace:
    def test_agrees_with_a_capture_of_each_prompt(
        self, router: ExpertRouter, tmp_path: Path
    ) -> None:
        trace = record_trace(router, CORPUS, tmp_path, batch_size=3, router_logits=True)
        assert trace.num_tokens == sum(LENGTHS) and trace.layers == router.info.moe_layers
        for index, ids in enumerate(CORPUS.tokenize(router.tokenizer)):
            found = trace.prompt(index)
            assert found.token_ids.tolist() == ids
            if not ids:
                continue
            with router.capture("expert_ids", "expert_weights", "router_logits") as seen:
                router.forward(ids)
            for place, layer in enumerate(trace.layers):
                for name in ("expert_ids", "expert_weights", "router_logits"):
                    stored, live = getattr(found, name)[place], getattr(seen[layer], name)
                    np.testing.assert_allclose(stored, live, atol=2e-3 * (name != "expert_ids"))

    def test_reports_what_is_empty_and_cut(self, router: ExpertRouter, tmp_path: Path) -> None:
        trace = record_trace(router, CORPUS, tmp_path, sequence_length=6)
        assert trace.prompt_tokens.tolist() == [min(length, 6) for length in LENGTHS]
        assert trace.notes == (
            "1 of 10 prompts have no tokens and are not in the numbers.",
            "3 of 10 prompts are cut after 6 tokens.",
        )
        assert trace.header["corpus"]["empty_prompts"] == 1

    def test_describes_itself(self, router: ExpertRouter, tmp_path: Path) -> None:
        with router.override(k=1, mask=[3]):
            trace = record_trace(router, CORPUS, tmp_path, sample_size=4, seed=2)
        header = json.loads((tmp_path / "trace.json").read_text())
        assert header["complete"] and header["model"]["model_type"] == "qwen3_moe"
        assert {"config_sha256", "weights_sha256", "tokenizer_sha256"} <= header["model"].keys()
        assert header["settings"]["sample_size"] == 4 and header["corpus"]["prompts"] == 4
        assert header["settings"]["overrides"] == {
            str(layer): {"k": 1, "mask": [3]} for layer in trace.layers
        }
        assert set(header["definitions"]) >= {"expert_ids", "expert_weights"}
        assert trace.slots == 1 and not (everything(trace).expert_ids == 3).any()
        assert trace.labels == tuple(p.label for p in CORPUS.sample(4, 2).prompts)

    def test_tokens_are_shown_without_the_model(self, router: ExpertRouter, tmp_path: Path) -> None:
        trace = record_trace(router, CORPUS, tmp_path)
        assert list(trace.prompt(0).visible_tokens()) == words(3, 0).split()

    def test_progress_counts_every_token(self, router: ExpertRouter, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        record_trace(
            router, CORPUS, tmp_path, batch_size=2, progress=lambda *call: calls.append(call)
        )
        assert calls[0] == (0, 58) and calls[-1] == (58, 58)
        assert calls == sorted(calls) and len(calls) > 4

    def test_model_without_a_folder(self, tmp_path: Path, router: ExpertRouter) -> None:
        model, config = build("mixtral")
        with ExpertRouter(model, router.tokenizer, config) as bare:
            trace = record_trace(bare, CORPUS, tmp_path)
        assert "weights_sha256" not in trace.model and trace.num_tokens == 58

    def test_router_keeps_nothing(self, router: ExpertRouter, tmp_path: Path) -> None:
        record_trace(router, CORPUS, tmp_path)
        assert not router._instrument.attached and not router._instrument.sinks

    def test_refusals(self, router: ExpertRouter, tmp_path: Path) -> None:
        for option in ("batch_size", "sequence_length", "sample_size", "shard_tokens"):
            with pytest.raises(UsageError, match="must be at least 1"):
                record_trace(router, CORPUS, tmp_path / "run", **cast("Any", {option: 0}))
        with pytest.raises(CaptureError, match="none of the 2 prompts"):
            record_trace(router, Corpus("c", (Prompt(""), Prompt("  "))), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_weights_that_are_no_numbers(self, tmp_path: Path, router: ExpertRouter) -> None:
        model, config = build("qwen3_moe")
        gate = model.model.layers[1].mlp.gate
        gate.weight = gate.weight * float("nan")
        with (
            ExpertRouter(model, router.tokenizer, config) as broken,
            pytest.raises(CaptureError, match="layer 1 gives expert_weights"),
        ):
            record_trace(broken, CORPUS, tmp_path)


class _Stop(BaseException):
    """As abrupt as a KeyboardInterrupt, but not pytest's."""


class TestInterruption:
    @pytest.mark.parametrize("patience", [2, 3, 5])
    def test_stopped_again_and_again(
        self, router: ExpertRouter, whole: Path, tmp_path: Path, patience: int
    ) -> None:
        """Each run is stopped after some batches; finished shards are never run again."""
        starts: list[int] = []
        for _ in range(60):
            calls: list[int] = []

            def stop(done: int, total: int, calls: list[int] = calls) -> None:
                calls.append(done)
                if len(calls) > patience and done < total:
                    raise _Stop

            try:
                record_trace(router, CORPUS, tmp_path, shard_tokens=12, batch_size=2, progress=stop)
                break
            except _Stop:
                assert (starts or [0])[-1] <= calls[0]
                starts.append(calls[0])
        assert bytes_of(tmp_path) == bytes_of(whole)

    @pytest.mark.parametrize("moment", ["batch", "write", "rename"])
    def test_killed(self, checkpoint: Path, whole: Path, tmp_path: Path, moment: str) -> None:
        """A process that dies by SIGKILL in the middle of a shard, then the same call again."""
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, str(checkpoint), str(tmp_path), moment],
            cwd=Path(__file__).parent,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        names = {path.name for path in tmp_path.iterdir()}
        assert "shard-00000.safetensors" in names and "shard-00002.safetensors" not in names
        assert (".shard-00001.safetensors.part" in names) == (moment != "batch")
        with ExpertRouter.from_pretrained(checkpoint) as router:
            record_trace(router, CORPUS, tmp_path, shard_tokens=12, batch_size=2)
        assert bytes_of(tmp_path) == bytes_of(whole)

    def test_another_model_is_refused(
        self, router: ExpertRouter, whole: Path, tmp_path: Path
    ) -> None:
        other = save_checkpoint("qwen3_moe", tmp_path, seed=1)
        assert weights_sha256(other) != weights_sha256(router.path or Path())
        with (
            ExpertRouter.from_pretrained(other) as changed,
            pytest.raises(UsageError, match=r"another model \(weights"),
        ):
            record_trace(changed, CORPUS, whole, shard_tokens=12, batch_size=2)
        with pytest.raises(UsageError, match=r"other settings \(batch_size: 2 -> 3\)"):
            record_trace(router, CORPUS, whole, shard_tokens=12, batch_size=3)
        with router.override(k=1), pytest.raises(UsageError, match="overrides"):
            record_trace(router, CORPUS, whole, shard_tokens=12, batch_size=2)


_KILLED = """
import os, signal, sys
from pathlib import Path
from moe_lens import atomic
from moe_lens.recording import record_trace
from moe_lens.router import ExpertRouter
from test_recording import CORPUS

model, folder, moment = sys.argv[1:]
shards = []
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
fsync, write_bytes = os.fsync, Path.write_bytes

def progress(done, total):
    if moment == "batch" and (Path(folder) / "shard-00000.safetensors").exists():
        die()

def half_written(path, data):
    second = path.name == ".shard-00001.safetensors.part"
    write_bytes(path, data[: len(data) // 2] if second and moment == "write" else data)
    if second:
        die()

Path.write_bytes = half_written
router = ExpertRouter.from_pretrained(model)
record_trace(router, CORPUS, folder, shard_tokens=12, batch_size=2, progress=progress)
"""


class TestProfile:
    def test_live_equals_trace(self, router: ExpertRouter, tmp_path: Path) -> None:
        live = record_profile(router, CORPUS, batch_size=3)
        stored = Profile.from_trace(record_trace(router, CORPUS, tmp_path, shard_tokens=20))
        for name in ("counts", "first_counts", "coactivation", "transitions", "label_counts"):
            assert np.array_equal(getattr(live, name), getattr(stored, name)), name
        assert np.array_equal(live.block_prompts, stored.block_prompts)
        assert abs(cast("Any", live.vocabulary) - stored.vocabulary).sum() == 0
        # The trace keeps weights in float16.
        np.testing.assert_allclose(live.weight_sums, stored.weight_sums, rtol=1e-3)
        assert live.model == stored.model and live.labels == ("even", "odd")
        assert live.num_prompts == 9 and live.num_tokens == 58

    def test_halves(self, router: ExpertRouter) -> None:
        whole = record_profile(router, CORPUS, outputs=True)
        halves = [
            record_profile(router, Corpus("half", part), outputs=True)
            for part in (CORPUS.prompts[:4], CORPUS.prompts[4:])
        ]
        both = halves[0] + halves[1]
        assert np.array_equal(both.counts, whole.counts)
        assert np.array_equal(both.coactivation, whole.coactivation)
        assert both.outputs is not None and whole.outputs is not None
        for name in ("norms", "weighted_norms", "outputs"):
            one, two = getattr(both.outputs, name), getattr(whole.outputs, name)
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4"])
    def test_output_sums_against_a_capture(self, name: str, router: ExpertRouter) -> None:
        """Norms, weight x norms and vectors, token by token, from what a capture shows."""
        model, config = build(name)
        with ExpertRouter(model, router.tokenizer, config) as tiny:
            profile = record_profile(tiny, CORPUS, outputs=True, batch_size=3)
            assert profile.outputs is not None
            norms = np.zeros_like(profile.outputs.norms)
            weighted, vectors = np.zeros_like(norms), np.zeros_like(profile.outputs.outputs)
            for ids in filter(None, CORPUS.tokenize(tiny.tokenizer)):
                with tiny.capture("expert_ids", "expert_weights", "expert_outputs") as seen:
                    tiny.forward(ids)
                for place, layer in enumerate(profile.layers):
                    shown = cast("Any", seen[layer])
                    for token, slot in np.ndindex(shown.expert_ids.shape):
                        expert = shown.expert_ids[token, slot]
                        output = shown.expert_outputs[token, slot].astype(np.float64)
                        length = np.sqrt((output**2).sum())
                        norms[place, expert] += length
                        weighted[place, expert] += length * shown.expert_weights[token, slot]
                        vectors[place, expert] += output
        np.testing.assert_allclose(profile.outputs.norms, norms, rtol=1e-4)
        np.testing.assert_allclose(profile.outputs.weighted_norms, weighted, rtol=1e-4)
        np.testing.assert_allclose(profile.outputs.outputs, vectors, rtol=1e-3, atol=1e-4)

    def test_follows_a_generation(self, router: ExpertRouter) -> None:
        recorder = ProfileRecorder(router.info.router_width)
        with router.recording(recorder):
            first = router.generate("w1 w2 w3", max_tokens=4)
            router.generate("w4", max_tokens=2)
        profile = recorder.profile()
        assert profile.num_prompts == 2
        assert profile.num_tokens >= len(first.prompt_token_ids) + 3
        assert profile.block_tokens[:2].sum() == profile.num_tokens

    def test_nothing_recorded(self, router: ExpertRouter) -> None:
        with pytest.raises(CaptureError, match="no token"):
            ProfileRecorder(8).profile()


class TestPrompt:
    def test_equals_the_trace(self, router: ExpertRouter, tmp_path: Path) -> None:
        trace = record_trace(router, CORPUS, tmp_path, router_logits=True)
        routes = record_prompt(router, CORPUS.prompts[4], router_logits=True)
        stored = trace.prompt(4)
        assert np.array_equal(routes.expert_ids, stored.expert_ids)
        np.testing.assert_allclose(routes.expert_weights, stored.expert_weights, atol=1e-3)
        assert routes.visible_tokens() == stored.visible_tokens()
        assert routes.position.tolist() == list(range(12)) and set(routes.prompt) == {0}

    def test_layers_that_differ_in_k(self, router: ExpertRouter, tmp_path: Path) -> None:
        first, second = router.info.moe_layers[:2]
        overrides: dict[int, Any] = {first: _override(k=1)}
        with router.override(overrides):
            routes = record_prompt(router, words(5, 0))
            trace = record_trace(router, CORPUS, tmp_path)
        assert (routes.expert_ids[0, :, 1] == NO_EXPERT).all()
        assert (routes.expert_ids[1] != NO_EXPERT).all()
        profile = Profile.from_trace(trace)
        assert profile.counts.sum(axis=1)[:2].tolist() == [58, 116]
        assert second in trace.layers

    def test_empty(self, router: ExpertRouter) -> None:
        with pytest.raises(CaptureError, match="prompt"):
            record_prompt(router, "")


def _override(**changes: Any) -> Any:
    from moe_lens.override import Override

    return Override(**changes)
