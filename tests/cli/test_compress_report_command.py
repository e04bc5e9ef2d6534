"""The command lines that a model card shows, pasted into a shell; and ``--upload-repo``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

SAME = ("model.safetensors", "config.json", "plan.json")


@pytest.fixture
def home(files: Any, tmp_path: Path) -> Path:
    """A folder in which the parent and both texts lie, with names that a shell would take apart."""
    shutil.copytree(files.moe, tmp_path / "it's $HOME")
    shutil.copy(files.text, tmp_path / "a text.jsonl")
    shutil.copy(files.other_text, tmp_path / "other & text.jsonl")
    return tmp_path


def words(home: Path) -> list[object]:
    texts = ["--data", home / "a text.jsonl", "--eval-data", home / "other & text.jsonl"]
    return ["compress", home / "it's $HOME", *texts, "--sample-size", "6", "--seed", "5"]


def pasted(line: str, folder: Path) -> str:
    """What a shell prints for it; the installed command is found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(card: Path) -> list[str]:
    """The command lines of a model card."""
    parts = card.read_text().split("```bash\n")[1:]
    return [part.partition("\n```")[0] for part in parts]


def test_the_lines_of_the_card_work_when_pasted(run: Any, home: Path) -> None:
    small = home / "so small"
    options = ["--threshold", "0.05", "--align", "weights", "--experts-per-token", "1"]
    assert run(*words(home), *options, "--output", small).code == 0
    apply, anew, verify = lines_of(small / "README.md")
    # What is named by the last part of its path lies in the folder the line is pasted in.
    for name in ("it's $HOME", "a text.jsonl", "other & text.jsonl"):
        (small / name).symlink_to(home / name)
    pasted(apply, small)
    made = home / "so small-again"
    assert all((made / name).read_bytes() == (small / name).read_bytes() for name in SAME)
    shutil.rmtree(made)
    pasted(anew, home)
    assert all((made / name).read_bytes() == (small / name).read_bytes() for name in SAME)
    found = json.loads(pasted(f"{verify} --json", small))
    stored = json.loads((small / "report.json").read_text())["verification"]
    assert (found["loss"], found["labels"]) == (stored["loss"], stored["labels"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the hub; holds what it was asked for."""
    asked: list[str] = []

    def whoami(api: HfApi) -> dict[str, str]:
        asked.append("whoami")
        return {"name": "me"}

    def create_repo(api: HfApi, repo: str, **options: Any) -> str:
        asked.append(f"create {repo}")
        return f"https://huggingface.co/{repo}"

    def upload_folder(api: HfApi, *, folder_path: Path, **options: Any) -> None:
        assert (folder_path / "report.json").is_file()
        asked.append(f"upload {folder_path.name}")

    for call in (whoami, create_repo, upload_folder):
        monkeypatch.setattr(HfApi, call.__name__, call)
    return asked


def test_uploads_what_was_made(run: Any, home: Path, hub: list[str]) -> None:
    small = home / "small"
    options = ["--ratio", "0.5", "--method", "frequency", "--output", small]
    found = run(*words(home), *options, "--upload-repo", "me/small")
    assert found.code == 0
    assert found.out.splitlines()[-1] == "Uploaded to https://huggingface.co/me/small"
    assert hub == ["whoami", "whoami", "create me/small", "upload small"]
    found = run(*words(home), *options, "--upload-repo", "me/small", "--force", "--json")
    assert found.json["uploaded"] == "https://huggingface.co/me/small"


def test_uploads_nothing_that_lost_too_much(run: Any, home: Path, hub: list[str]) -> None:
    options = ["--ratio", "0.5", "--method", "frequency", "--output", home / "small"]
    found = run(*words(home), *options, "--upload-repo", "me/small", "--max-kl", "0")
    assert found.code == 1
    assert hub == ["whoami"]


def test_an_upload_that_cannot_be_is_refused_at_once(run: Any, home: Path, hub: list[str]) -> None:
    options = ["--ratio", "0.5", "--method", "frequency"]
    dry = run(*words(home), *options, "--dry-run", "--upload-repo", "me/small")
    assert dry.code == 2
    assert "--dry-run" in dry.err
    bad = run(*words(home), *options, "--output", home / "small", "--upload-repo", "small")
    assert bad.code == 2
    assert "--upload-repo OWNER/small" in bad.err
    assert not (home / "small").exists()
    assert hub == []


def test_a_failed_upload_leaves_the_model(
    run: Any, home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(api: HfApi, **options: Any) -> None:
        raise ConnectionError("the line went dead")

    monkeypatch.setattr(HfApi, "upload_folder", broken)
    small = home / "small"
    options = ["--ratio", "0.5", "--method", "frequency", "--output", small]
    found = run(*words(home), *options, "--upload-repo", "me/small")
    assert found.code == 1
    assert "Written to " in found.out
    assert f"hf upload me/small {small}" in found.err
    assert (small / "report.json").is_file()
