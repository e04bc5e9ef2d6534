"""Traces on disk: what is written is what is read, and nothing damaged is read at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_lens.errors import CaptureError, MoeLensError, UsageError
from moe_lens.profile import Profile
from moe_lens.recording.writer import TraceWriter
from moe_lens.trace import NO_EXPERT, Routes, Trace, is_trace
from moe_lens.trace.folder import FORMAT, VERSION
from route_cases import TEXTS, random_routes

LENGTHS = (5, 0, 7, 1, 4, 0)
SHARDS = [range(2), range(2, 4), range(4, 6)]
LABELS = ["code", None, "prose", "code", None, "math"]


def header(routes: Routes, **changes: Any) -> dict[str, Any]:
    settings = {"router_logits": routes.router_logits is not None, "batch_size": 8}
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": "m", "config_sha256": "c", "weights_sha256": "w"},
        "layers": list(routes.layers),
        "num_experts": routes.router_width,
        "router_width": routes.router_width,
        "corpus": {"name": "p.txt", "fingerprint": "f", "tokens_sha256": "t", "notes": ["a note."]},
        "settings": settings,
        "versions": {"moe_lens": "1", "mlx": "1", "mlx_lm": "1", "device": "cpu"},
        "definitions": {},
    }
    for part, change in changes.items():
        content[part] = content[part] | change
    return content


def writer(folder: Path, routes: Routes, changes: Any = None, **options: Any) -> TraceWriter:
    prompts = {"tokens": list(LENGTHS), "labels": LABELS, "sha256": ["0"] * len(LENGTHS)}
    return TraceWriter(folder, header(routes, **(changes or {})), prompts, TEXTS, SHARDS, **options)


def part(routes: Routes, shard: range) -> Routes:
    return routes.take(
        np.flatnonzero((routes.prompt >= shard.start) & (routes.prompt < shard.stop))
    )


def write(folder: Path, routes: Routes, shards: int = 3, **options: Any) -> None:
    """Write the first ``shards`` of the three, and finish if that is all of them."""
    with writer(folder, routes, **options) as open_writer:
        for shard in SHARDS[len(open_writer.entries) : shards]:
            open_writer.write(part(routes, shard))
        if open_writer.complete:
            open_writer.finish()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def routes() -> Routes:
    return random_routes(lengths=LENGTHS)


@pytest.fixture
def folder(tmp_path: Path, routes: Routes) -> Path:
    write(tmp_path / "run", routes)
    return tmp_path / "run"


def assert_equal(one: Routes, two: Routes) -> None:
    for name in ("token_ids", "prompt", "position", "expert_ids", "expert_weights"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert (one.router_logits is None) == (two.router_logits is None)
    if one.router_logits is not None:
        assert np.array_equal(one.router_logits, two.router_logits)


class TestReading:
    @pytest.mark.parametrize("uneven", [False, True])
    @pytest.mark.parametrize("logits", [False, True])
    def test_round_trip(self, tmp_path: Path, uneven: bool, logits: bool) -> None:
        routes = random_routes(lengths=LENGTHS, uneven=uneven, logits=logits)
        write(tmp_path, routes)
        trace = Trace.open(tmp_path)
        assert_equal(Routes.concatenate(list(trace.shards())), routes)
        assert trace.layers == (1, 2, 3) and trace.slots == 2 and trace.router_width == 8
        assert trace.num_tokens == 17 and trace.num_prompts == 6
        assert trace.has_router_logits is logits and trace.notes == ("a note.",)

    def test_ids_are_one_byte_where_they_fit(self, tmp_path: Path) -> None:
        for name, width, uneven, dtype in (
            ("a", 256, False, np.uint8),
            ("b", 257, False, np.uint16),
            ("c", 8, True, np.uint16),
        ):
            write(tmp_path / name, random_routes(lengths=LENGTHS, width=width, uneven=uneven))
            stored = load_file(tmp_path / name / "shard-00000.safetensors")
            assert stored["expert_ids"].dtype == dtype
            assert stored["expert_weights"].dtype == np.float16
            assert (stored["expert_ids"] == NO_EXPERT).any() == uneven

    def test_one_prompt(self, folder: Path, routes: Routes) -> None:
        trace = Trace.open(folder)
        for index, length in enumerate(LENGTHS):
            found = trace.prompt(index)
            assert len(found) == length
            assert_equal(found, part(routes, range(index, index + 1)))

    def test_all_prompts(self, folder: Path) -> None:
        trace = Trace.open(folder)
        for index, found in enumerate(trace.prompts()):
            assert_equal(found, trace.prompt(index))
        assert index == 5

    def test_texts_and_labels(self, folder: Path) -> None:
        trace = Trace.open(folder)
        assert trace.labels == tuple(LABELS) and trace.label_names == ("code", "math", "prose")
        ids = trace.prompt(2).token_ids
        shown = ("␣the", "def", "(", "):↵", "␣×4", "$x$", "<E4><BD>", "你", "⇥", "<a&b>")
        assert trace.prompt(2).visible_tokens() == tuple(shown[token] for token in ids)

    def test_only_the_asked_rows_are_read(self, folder: Path, monkeypatch: Any) -> None:
        trace = Trace.open(folder)
        (folder / "shard-00000.safetensors").unlink()
        assert len(trace.prompt(4)) == 4

    def test_profile_does_not_depend_on_the_shards(self, folder: Path, routes: Routes) -> None:
        folded = Profile.from_trace(Trace.open(folder))
        whole = Profile.from_routes(routes, LABELS)
        assert np.array_equal(folded.coactivation, whole.coactivation)
        assert np.array_equal(folded.label_counts[0], whole.label_counts[0])
        assert folded.num_prompts == 4 and folded.model == {
            "config_sha256": "c",
            "weights_sha256": "w",
        }

    def test_no_such_prompt(self, folder: Path) -> None:
        for index in (-1, 6):
            with pytest.raises(UsageError, match="prompts 0 to 5"):
                Trace.open(folder).prompt(index)

    def test_no_such_layer(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="the MoE layers are 1, 2, 3"):
            Trace.open(folder).prompt(0).place(0)


class TestDamage:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert not is_trace(tmp_path)
        with pytest.raises(UsageError, match="no trace"):
            Trace.open(tmp_path)

    def test_shard_cut_short(self, folder: Path) -> None:
        shard = folder / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-7])
        with pytest.raises(MoeLensError, match="cut short"):
            Trace.open(folder)

    def test_shard_missing(self, folder: Path) -> None:
        (folder / "shard-00002.safetensors").unlink()
        with pytest.raises(MoeLensError, match=r"shard-00002\.safetensors is missing"):
            Trace.open(folder)

    def test_an_expert_that_is_not(self, folder: Path, routes: Routes) -> None:
        shard = folder / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        start = json.loads(content[8:header])["expert_ids"]["data_offsets"][0]
        content[header + start] = routes.router_width
        shard.write_bytes(content)
        with pytest.raises(MoeLensError, match=r"shard-00000\.safetensors is damaged: it names"):
            Trace.open(folder).prompt(0)

    def test_shard_with_a_broken_header(self, folder: Path) -> None:
        shard = folder / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        content[10:14] = b"????"
        shard.write_bytes(content)
        trace = Trace.open(folder)
        with pytest.raises(MoeLensError, match="is damaged"):
            trace.prompt(0)

    def test_flipped_bit_is_found_by_verify(self, folder: Path) -> None:
        Trace.open(folder).verify()
        shard = folder / "shard-00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(MoeLensError, match="checksum"):
            Trace.open(folder).verify()

    def test_shard_of_another_shape(self, folder: Path) -> None:
        shard = folder / "shard-00000.safetensors"
        arrays = load_file(shard)
        arrays["expert_ids"] = np.ascontiguousarray(arrays["expert_ids"][:, :, :1])
        save_file(arrays, shard)
        described = json.loads((folder / "trace.json").read_text())
        described["shards"][0]["bytes"] = shard.stat().st_size
        (folder / "trace.json").write_text(json.dumps(described))
        with pytest.raises(MoeLensError, match=r"expert_ids has shape \[3, 5, 1\]"):
            Trace.open(folder).prompt(0)

    @pytest.mark.parametrize("name", ["prompts.json", "tokens.json"])
    def test_other_files(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(MoeLensError, match=f"{name} is missing"):
            Trace.open(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is damaged"),
            ("[]", "holds no JSON object"),
            ('{"format": "other"}', "does not describe a moe-lens trace"),
            (json.dumps({"format": FORMAT, "version": 99}), "version 99"),
        ],
    )
    def test_header(self, folder: Path, content: str, message: str) -> None:
        (folder / "trace.json").write_text(content)
        with pytest.raises(MoeLensError, match=message):
            Trace.open(folder)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("trace.json", {"layers": "12"}, '"layers" is missing or of the wrong kind'),
            ("trace.json", {"layers": [2, 1]}, '"layers" do not ascend'),
            ("trace.json", {"router_width": 0}, "no possible number of experts"),
            ("trace.json", {"slots": 0}, "no possible number of slots"),
            ("trace.json", {"slots": None}, "no possible number of slots"),
            ("trace.json", {"complete": 1}, '"complete" is missing or of the wrong kind'),
            ("trace.json", {"model": {}}, '"model" is missing'),
            ("prompts.json", {"labels": [[]]}, '"labels" are missing or of the wrong kind'),
            ("prompts.json", {"labels": []}, "not one label, hash and length"),
            ("prompts.json", {"tokens": [5, 0, 7, 1, 4, -1]}, "no possible length"),
            ("prompts.json", {"tokens": [5, 0, 7, 2, 4, 0]}, "have not the tokens of shard-00001"),
            ("tokens.json", {"text": [1]}, "holds no texts of tokens"),
            ("tokens.json", {"bytes": {"1": "xy"}}, "holds no texts of tokens"),
        ],
    )
    def test_json_that_cannot_be(
        self, folder: Path, name: str, change: dict[str, Any], message: str
    ) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | change))
        with pytest.raises(MoeLensError, match=message):
            Trace.open(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"file": "../trace.json"}, "names a shard that is none"),
            ({"file": "/etc/passwd"}, "names a shard that is none"),
            ({"extra": 1}, "names a shard that is none"),
            ({"tokens": 0}, "says of shard-00000.safetensors what cannot be"),
            ({"sha256": "f"}, "says of shard-00000.safetensors what cannot be"),
            ({"first_prompt": 1}, "do not follow one another"),
            ({"stop_prompt": 3}, "do not follow one another"),
        ],
    )
    def test_shards_that_cannot_be(
        self, folder: Path, change: dict[str, Any], message: str
    ) -> None:
        content = json.loads((folder / "trace.json").read_text())
        content["shards"][0] |= change
        (folder / "trace.json").write_text(json.dumps(content))
        with pytest.raises(MoeLensError, match=message):
            Trace.open(folder)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("prompt", np.full(5, 9, np.int32), "prompts of other shards"),
            ("token_ids", np.full(5, -1, np.int32), "tokens that are none"),
            ("position", np.zeros(5, np.float32), "position is float32"),
        ],
    )
    def test_arrays_that_cannot_be(self, folder: Path, name: str, value: Any, message: str) -> None:
        path = folder / "shard-00000.safetensors"
        save_file(load_file(path) | {name: value}, path)
        content = json.loads((folder / "trace.json").read_text())
        content["shards"][0]["bytes"] = path.stat().st_size
        (folder / "trace.json").write_text(json.dumps(content))
        with pytest.raises(MoeLensError, match=message):
            list(Trace.open(folder).shards())

    def test_incomplete(self, tmp_path: Path, routes: Routes) -> None:
        write(tmp_path, routes, shards=2)
        assert is_trace(tmp_path)
        with pytest.raises(MoeLensError, match="not complete"):
            Trace.open(tmp_path)


class TestWriting:
    @pytest.mark.parametrize("shards", [0, 1, 2, 3])
    def test_resumed_is_bit_identical(
        self, tmp_path: Path, folder: Path, routes: Routes, shards: int
    ) -> None:
        write(tmp_path / "again", routes, shards=shards)
        (tmp_path / "again" / ".shard-00002.safetensors.part").write_bytes(b"half a sh")
        write(tmp_path / "again", routes)
        assert bytes_of(tmp_path / "again").items() >= bytes_of(folder).items()
        assert len(bytes_of(tmp_path / "again")) == len(bytes_of(folder)) + (shards == 3)

    def test_bytes_do_not_depend_on_the_run(self, tmp_path: Path, routes: Routes) -> None:
        for name in "abcd":
            write(tmp_path / name, routes)
        assert len({str(bytes_of(tmp_path / name)) for name in "abcd"}) == 1

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("model", {"weights_sha256": "x"}, r"another model \(weights_sha256: w -> x\)"),
            ("corpus", {"tokens_sha256": "x"}, "another corpus"),
            ("settings", {"batch_size": 4}, r"other settings \(batch_size: 8 -> 4\)"),
            ("versions", {"mlx": "2"}, r"other versions \(mlx: 1 -> 2\)"),
        ],
    )
    @pytest.mark.parametrize("shards", [1, 3])
    def test_other_recordings_are_not_resumed(
        self, tmp_path: Path, routes: Routes, part: str, change: Any, message: str, shards: int
    ) -> None:
        write(tmp_path, routes, shards=shards)
        before = bytes_of(tmp_path)
        with pytest.raises(UsageError, match=message):
            write(tmp_path, routes, changes={part: change})
        assert bytes_of(tmp_path) == before

    def test_another_name_for_the_same_is_no_difference(
        self, tmp_path: Path, routes: Routes
    ) -> None:
        write(tmp_path, routes, shards=1)
        write(tmp_path, routes, changes={"corpus": {"name": "./p.txt", "notes": []}})
        assert Trace.open(tmp_path).num_tokens == 17

    def test_a_damaged_shard_is_recorded_again(self, folder: Path, routes: Routes) -> None:
        before = bytes_of(folder)
        for damaged in (b"\0" * 40, before["shard-00001.safetensors"][:-1] + b"\1"):
            (folder / "shard-00001.safetensors").write_bytes(damaged)
            write(folder, routes)
            assert bytes_of(folder) == before

    def test_complete_is_left_alone(self, folder: Path, routes: Routes) -> None:
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        write(folder, routes)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    def test_without_resume(self, folder: Path, routes: Routes) -> None:
        with pytest.raises(UsageError, match="already holds a trace"):
            write(folder, routes, resume=False)

    def test_overwrite_takes_only_its_own_files(self, folder: Path, routes: Routes) -> None:
        (folder / "mine.txt").write_text("keep")
        other = replace(routes, expert_ids=routes.expert_ids[:, :, ::-1])
        write(folder, other, changes={"settings": {"batch_size": 4}}, overwrite=True)
        assert_equal(Routes.concatenate(list(Trace.open(folder).shards())), other)
        assert (folder / "mine.txt").read_text() == "keep"

    def test_foreign_folder(self, tmp_path: Path, routes: Routes) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="not empty and holds no trace"):
                write(tmp_path, routes, overwrite=overwrite)

    def test_folder_that_cannot_be(self, tmp_path: Path, routes: Routes) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="cannot be made"):
            write(tmp_path / "file" / "run", routes)

    def test_one_writer_at_a_time(self, tmp_path: Path, routes: Routes) -> None:
        with (
            writer(tmp_path, routes),
            pytest.raises(MoeLensError, match="another process"),
            writer(tmp_path, routes),
        ):
            pass
        write(tmp_path, routes)

    def test_number_of_slots_may_not_change(self, tmp_path: Path, routes: Routes) -> None:
        fewer = replace(
            routes,
            expert_ids=routes.expert_ids[:, :, :1],
            expert_weights=routes.expert_weights[:, :, :1],
        )
        with writer(tmp_path, routes) as open_writer:
            open_writer.write(part(routes, SHARDS[0]))
            with pytest.raises(CaptureError, match="1 experts per token"):
                open_writer.write(part(fewer, SHARDS[1]))
