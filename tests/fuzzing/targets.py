"""What is damaged, and through which doors it is opened afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

import moe_lens.cli
from moe_lens import MoeLensError
from moe_lens.compress import plan_prune, read_plan, write
from moe_lens.compress.merging.planning import plan_merge_to
from moe_lens.compress.statistics.statistics_file import load_statistics
from moe_lens.compress.tensors.parent import open_parent
from moe_lens.compress.tensors.size_table import SizeTable
from moe_lens.profile import Profile
from moe_lens.router import ExpertRouter
from moe_lens.trace import Trace

from .files import MODELS, GoodFiles
from .mutations import ByteStep, JsonStep, byte_steps, changed_bytes, changed_json, json_steps
from .sandbox import judge

HEADER_REACH = 6000
"""Bytes in which the header of a tiny weight file lies."""

OUTPUT = ("smaller", ".smaller.work")
"""What writing a smaller model may make."""


class Target(ABC):
    """One kind of file. `strategy` draws cases, `open` prepares one and returns its judgement."""

    strategy: st.SearchStrategy[Any]

    def __init__(self, good: GoodFiles) -> None:
        self.good = good

    @abstractmethod
    def run(self, case: Any, place: Path) -> str:
        """Damage a copy below the empty folder `place`, and open it; see `sandbox.judge`."""


class ConfigTarget(Target):
    """config.json of several architectures."""

    kinds = st.sampled_from([*((name, None) for name in MODELS), ("qwen3_moe", 4)])
    strategy = st.tuples(kinds, st.one_of(json_steps, byte_steps(2000)))

    def run(self, case: Any, place: Path) -> str:
        (name, quantise), steps = case
        folder = Path(shutil.copytree(self.good.model(name, quantise), place / "model"))
        damage(folder / "config.json", steps)
        return judge(lambda: run_model(folder), place, ())


class SafetensorsTarget(Target):
    """A weight file: its header as JSON, or its bytes."""

    strategy = st.one_of(json_steps, byte_steps(HEADER_REACH))

    def run(self, case: Any, place: Path) -> str:
        folder = Path(shutil.copytree(self.good.model(), place / "model"))
        damage_safetensors(folder / "model.safetensors", case)
        return judge(lambda: run_model(folder), place, ())


class IndexTarget(Target):
    """The index of a checkpoint in several files."""

    strategy = st.one_of(json_steps, byte_steps(2000))

    def run(self, case: Any, place: Path) -> str:
        folder = Path(shutil.copytree(self.good.sharded(), place / "model"))
        damage(folder / "model.safetensors.index.json", case)
        return judge(lambda: run_model(folder), place, ())


class PlanTarget(Target):
    """A plan, shown and applied."""

    strategy = st.tuples(st.integers(0, 2), st.one_of(json_steps, byte_steps(3000)))

    def run(self, case: Any, place: Path) -> str:
        number, steps = case
        path = place / "plan.json"
        path.write_text(self.good.plans[number], encoding="utf-8")
        damage(path, steps)

        def act() -> None:
            run_command("plan", path)
            run_command("plan", path, "--json")
            plan = read_plan(path)
            plan._repr_html_()
            write(path, self.good.model(), place / "smaller")
            mx.eval(ExpertRouter.from_pretrained(place / "smaller").forward([[1, 2, 3]]))

        return judge(act, place, OUTPUT)


class TraceTarget(Target):
    """A recorded run, one of its files: looked at, counted, and recorded once more."""

    files = ("trace.json", "prompts.json", "tokens.json", "shard-00000.safetensors")
    steps = st.one_of(json_steps, byte_steps(3000))
    strategy = st.tuples(st.sampled_from(files), st.sampled_from(["look", "record"]), steps)

    def run(self, case: Any, place: Path) -> str:
        name, how, steps = case
        folder = Path(shutil.copytree(self.good.trace, place / "run"))
        if name.endswith("json"):
            damage(folder / name, steps)
        else:
            damage_safetensors(folder / name, steps)
        text = str(self.good.text)

        def look() -> None:
            run_command("heatmap", folder)
            run_command("heatmap", folder, "--number", "0", "--json")
            trace = Trace.open(folder)
            trace.verify()
            for routes in trace.prompts():
                np.sum(routes.expert_weights)
            Profile.from_trace(trace)

        def record() -> None:
            made = self.good.router.trace(text, folder, router_logits=True)
            assert made.num_tokens == Trace.open(self.good.trace).num_tokens

        return judge(look, place, ()) if how == "look" else judge(record, place, ("run",))


class StatisticsTarget(Target):
    """The statistics of a calibration, planned from."""

    strategy = st.one_of(json_steps, byte_steps(HEADER_REACH), st.tuples(st.none(), json_steps))

    def run(self, case: Any, place: Path) -> str:
        path = Path(shutil.copy(self.good.statistics, place))
        if isinstance(case, tuple):
            change_header(path, lambda text: change_metadata(text, case[1]))
        else:
            damage_safetensors(path, case)

        def act() -> None:
            found = load_statistics(path)
            plan_prune(found, experts=6).to_json()
            plan_merge_to(found, 6).to_json()

        return judge(act, place, ())


class LedgerTarget(Target):
    """The ledger of a run that was stopped, and that is to go on."""

    strategy = st.one_of(json_steps, byte_steps(2000))

    def run(self, case: Any, place: Path) -> str:
        shutil.copytree(self.good.stopped, place, dirs_exist_ok=True)
        damage(place / ".smaller.work" / "ledger.json", case)

        def act() -> None:
            write(
                place / "plan.json",
                self.good.model(),
                place / "smaller",
                shard_bytes=100_000,
                resume=True,
            )
            mx.eval(ExpertRouter.from_pretrained(place / "smaller").forward([[1, 2, 3]]))

        return judge(act, place, OUTPUT)


TARGETS: dict[str, Callable[[GoodFiles], Target]] = {
    "config": ConfigTarget,
    "safetensors": SafetensorsTarget,
    "index": IndexTarget,
    "plan": PlanTarget,
    "trace": TraceTarget,
    "statistics": StatisticsTarget,
    "ledger": LedgerTarget,
}


def run_model(folder: Path) -> None:
    """What a person does with a model: look at it, run it, ask how small it can become."""
    router = ExpertRouter.from_pretrained(folder)
    router.info.to_dict()
    mx.eval(router.forward([[1, 2, 3, 4]]))
    SizeTable.of(open_parent(folder))


def run_command(*words: object) -> None:
    """The command line; what it refuses is a `MoeLensError` here as well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = moe_lens.cli.main([str(word) for word in words])
    said = err.getvalue() + out.getvalue()
    assert "internal error" not in said, said
    assert "Traceback" not in said, said
    if code:
        raise MoeLensError(" ".join(said.split())[:1500] or "nothing was said")


def damage(path: Path, steps: list[JsonStep] | list[ByteStep]) -> None:
    """Damage a JSON file."""
    if isinstance(steps[0], JsonStep):
        path.write_text(changed_json(path.read_text(encoding="utf-8"), steps), encoding="utf-8")
    else:
        path.write_bytes(changed_bytes(path.read_bytes(), steps))


def damage_safetensors(path: Path, steps: list[JsonStep] | list[ByteStep]) -> None:
    """Damage a safetensors file, its header as JSON or all of it as bytes."""
    if isinstance(steps[0], JsonStep):
        change_header(path, lambda text: changed_json(text, steps))
    else:
        path.write_bytes(changed_bytes(path.read_bytes(), steps))


def change_header(path: Path, change: Callable[[str], str]) -> None:
    """Put another header in front of the same bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def change_metadata(header: str, steps: list[JsonStep]) -> str:
    """Damage the JSON text that stands in the metadata of a header."""
    content = json.loads(header)
    names = [name for name, text in content["__metadata__"].items() if text.startswith("{")]
    for name in names:
        content["__metadata__"][name] = changed_json(content["__metadata__"][name], steps)
    return json.dumps(content)
