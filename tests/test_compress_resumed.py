"""Every way to compress, stopped at the beginning of every stage, gives what it gives at once."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from moe_lens.compress import Plan, compress
from moe_lens.compress.choice.asked import Asked
from moe_lens.compress.resuming.ledger import read_ledger
from moe_lens.compress.resuming.work_folder import place_of
from moe_lens.compress.verification import use
from moe_lens.compress.verification.repetition import measure_repetition
from moe_lens.telling import Stage
from twins import save_twins, write_words

WAYS: dict[str, dict[str, Any]] = {
    "auto": {"ratio": 0.5},
    "merge": {"ratio": 0.5, "merge": True},
    "channels": {"ratio": 0.5, "method": "channels"},
    "per layer": {"ratio": 0.25, "per_layer": True},
    "repair": {"threshold": 0.8, "repair_router": 3},
    "hf": {"ratio": 0.5, "method": "reap", "format": "hf"},
    "streamed": {"ratio": 0.5, "method": "reap", "stream": True},
}

MEASURED = ("tokens_per_second", "memory")
"""Parts of a verification that are another each time."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    save_twins(folder / "twins")
    write_words(folder / "learn.jsonl", 8, 1, words=16)
    write_words(folder / "test.jsonl", 4, 2, words=16)
    return folder


@pytest.fixture(autouse=True)
def short_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verification generates takes most of the time, and is no part of this."""
    monkeypatch.setattr(use, "NEW_TOKENS", 4)
    monkeypatch.setitem(measure_repetition.__kwdefaults__, "new_tokens", 4)


def run(place: Path, output: Path, **options: Any) -> Any:
    texts = {"calibration": place / "learn.jsonl", "evaluation": place / "test.jsonl"}
    return compress(place / "twins", output=output, **texts, **options)


def deterministic(folder: Path) -> dict[str, Any]:
    """All files, without what a clock or the machine had a part in."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    report = json.loads(files.pop("report.json"))
    del report["timing"], files["README.md"]
    for name in MEASURED:
        del report["verification"][name]
    return {**files, "report.json": report}


@pytest.mark.parametrize("way", WAYS)
def test_stopped_at_every_stage(way: str, place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "whole" / "smaller", **WAYS[way])
    output = tmp_path / "parts" / "smaller"
    passed: set[str] = set()
    worked: Counter[str] = Counter()

    def stop(stage: Stage, done: int, total: int | None) -> None:
        worked[str(stage)] += bool(total and 0 < done < total)
        if str(stage) not in passed:
            passed.add(str(stage))
            raise KeyboardInterrupt

    for _ in range(60):
        try:
            run(place, output, **WAYS[way], resume=True, progress=stop)
        except KeyboardInterrupt:
            assert not output.exists()
        else:
            break
    assert len(passed) > 4
    assert deterministic(output) == deterministic(tmp_path / "whole" / "smaller")
    assert [path.name for path in output.parent.iterdir()] == ["smaller"]


def test_what_was_tried_is_not_tried_again(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    tried: list[str] = []

    def stop_at(count: int) -> Any:
        def stop(stage: Stage, done: int, total: int | None) -> None:
            if stage.name == "trying" and total is None and not done:
                tried.append(str(stage.of))
                if len(tried) == count:
                    raise KeyboardInterrupt

        return stop

    with pytest.raises(KeyboardInterrupt):
        run(place, output, ratio=0.5, progress=stop_at(6))
    kept = list(place_of(output).glob("trial-*.safetensors"))
    assert len(kept) == 5
    before = {path: path.stat().st_mtime_ns for path in kept}
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(place, output, ratio=0.5, progress=stop_at(14), resume=True, say=said.append)
    assert tried[6:11] == tried[:5]
    assert "(calibrated, channels calibrated, plans tried: 5)" in said[0]
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert len(list(place_of(output).glob("trial-*.safetensors"))) == 7


def test_every_argument_that_decides_a_byte_is_remembered(place: Path, tmp_path: Path) -> None:
    """An argument that is added to `compress` must be added here or to what is asked."""
    decides_nothing = {
        "output", "statistics_file", "max_kl", "dry_run", "force", "resume", "revision", "stream",
        "progress", "say",
    }  # fmt: skip
    otherwise = {
        "name": "the weights of the model",
        "calibration": "the text of --data",
        "evaluation": "the text of --eval-data",
        "merging": "the choices of the merge",
    }

    def stop(stage: Stage, done: int, total: int | None) -> None:
        if stage.name == "writing":
            raise KeyboardInterrupt

    output = tmp_path / "smaller"
    with pytest.raises(KeyboardInterrupt):
        run(place, output, ratio=0.5, method="reap", progress=stop)
    facts = read_ledger(place_of(output) / "ledger.json").request.facts
    for name in inspect.signature(compress).parameters.keys() - decides_nothing:
        assert otherwise.get(name, "--" + name.replace("_", "-")) in facts, name
    assert len(facts) > len(fields(Asked))


def test_a_plan_that_was_edited_is_another_request(place: Path, tmp_path: Path) -> None:
    made: Plan = run(place, tmp_path / "first", ratio=0.5, method="reap").plan
    file = tmp_path / "plan.json"
    file.write_text(made.to_json())

    def stop(stage: Stage, done: int, total: int | None) -> None:
        if stage.name == "verifying":
            raise KeyboardInterrupt

    output = tmp_path / "second"
    with pytest.raises(KeyboardInterrupt):
        run(place, output, plan=str(file), progress=stop)
    content = json.loads(file.read_text())
    layer = content["layers"][0]
    layer["groups"][0]["experts"], layer["removed"][0] = (
        [layer["removed"][0]],
        layer["groups"][0]["experts"][0],
    )
    file.write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"something else \(--plan changed\)"):
        run(place, output, plan=file, resume=True)
    assert run(place, output, plan=made, resume=True).plan == made
