"""Killed at any moment and gone on with, a compression gives the bytes of one that was not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twins import save_twins, write_words

KILLS = 50
SHARD = 250_000
"""Bytes of a weight file, so that the tiny model has several."""

WAYS: dict[str, dict[str, Any]] = {
    "channels": {"ratio": 0.25, "method": "reap", "expert_width": 32},
    "merge": {"threshold": 0.8},
}
"""Ways to compress, which together have all phases but the trials of `--method auto`."""

OFTEN = {"writing": 4}
"""Phases in which more can break."""

MEASURED = ("tokens_per_second", "memory")
"""Parts of a verification that are another each time."""

RUNS = Path(__file__).with_name("killed_runs.py")


class Runs:
    """Compressions of one model in processes of their own, one after the other."""

    def __init__(self, place: Path) -> None:
        self.place, self.log = place, place / "moments.json"
        self._server = subprocess.Popen(
            [sys.executable, str(RUNS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self, output: Path, way: str, die_at: tuple[str, int] | None = None, **options: Any
    ) -> int:
        """The exit code of one; at the end `moments` says how many there were in each phase."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {
            "arguments": {
                "name": str(self.place / "twins"),
                "output": str(output),
                "calibration": str(self.place / "learn.jsonl"),
                "evaluation": str(self.place / "test.jsonl"),
                **WAYS[way],
                **options,
            },
            "die_at": die_at,
            "log": str(self.log),
            "shard_bytes": SHARD,
        }
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    @property
    def moments(self) -> dict[str, int]:
        """Phase -> how much happened in it, of the last run that came to its end."""
        return json.loads(self.log.read_text())

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    place = tmp_path_factory.mktemp("killed")
    save_twins(place / "twins")
    write_words(place / "learn.jsonl", 12, 1, words=20)
    write_words(place / "test.jsonl", 4, 2, words=20)
    found = Runs(place)
    yield found
    found.close()


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def deterministic(folder: Path) -> dict[str, Any]:
    """All files, without what a clock or the machine had a part in."""
    files: dict[str, Any] = content(folder)
    report = json.loads(files.pop("report.json"))
    del report["timing"]
    for name in MEASURED:
        del report["verification"][name]
    del files["README.md"]  # made of the report
    return {**files, "report.json": report}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_moment(runs: Runs, way: str) -> None:
    source = content(runs.place / "twins")
    output = runs.place / way / "whole" / "smaller"
    assert runs(output, way) == 0
    expected = deterministic(output)
    assert len(list(output.glob("*.safetensors"))) > 2
    moments = runs.moments
    draw, killed, case = random.Random(way), dict.fromkeys(moments, 0), 0

    def turn(phase: str) -> tuple[float, float]:
        return killed[phase] / OFTEN.get(phase, 1), draw.random()

    while sum(killed.values()) < KILLS // len(WAYS):
        case += 1
        output = runs.place / way / str(case) / "smaller"
        resume = False
        # Evenly over the phases, and within a phase over its moments, sooner and later again.
        for phase in sorted(killed, key=turn)[:3]:
            code = runs(output, way, (phase, 1 + draw.randrange(moments[phase])), resume=resume)
            resume = True
            assert code in (0, -9)
            killed[phase] += code == -9
            if output.exists():
                assert deterministic(output) == expected
        assert runs(output, way, resume=True) == 0
        assert deterministic(output) == expected
        assert [path.name for path in output.parent.iterdir()] == ["smaller"]
    assert min(killed.values()) > 0, killed
    assert content(runs.place / "twins") == source
