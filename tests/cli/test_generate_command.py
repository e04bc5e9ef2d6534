"""``moe-lens generate``."""

from __future__ import annotations

import io
from typing import Any

import pytest

PROMPT = "w1 w2 w3 w4"


def test_text_alone_on_stdout(run: Any, files: Any) -> None:
    found = run("generate", files.moe, "--prompt", PROMPT, "--max-tokens", "5")
    assert found.code == 0
    made = run("generate", files.moe, "--prompt", PROMPT, "--max-tokens", "5", "--json").json
    assert found.out == made["text"] + "\n"
    assert len(made["token_ids"]) == 5
    assert made["prompt_token_ids"] == [1, 2, 3, 4]
    assert "5 tokens" in found.err


def test_prompt_from_stdin(run: Any, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", files.moe, "--max-tokens", "4"]
    direct = run(*words, "--prompt", PROMPT)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    assert run(*words, "--prompt", "-").out == direct.out


def test_seed(run: Any, files: Any) -> None:
    words = ["generate", files.moe, "--prompt", PROMPT, "--max-tokens", "8", "--temp", "1"]
    one, two = (run(*words, "--seed", "1").out for _ in range(2))
    assert one == two
    assert one != run(*words, "--seed", "2").out


def test_compare(run: Any, files: Any) -> None:
    words = ["generate", files.moe, "--prompt", PROMPT, "--max-tokens", "8"]
    change = ["--mask-experts", "*:0,1", "--mask-experts", "2:3"]
    found = run(*words, *change, "--compare")
    assert found.code == 0
    both = run(*words, *change, "--compare", "--json").json
    alone = run(*words, "--json").json
    changed = run(*words, *change, "--json").json
    assert both["baseline"]["token_ids"] == alone["token_ids"]
    assert both["changed"]["token_ids"] == changed["token_ids"]
    assert both["routing"]["mask_experts"] == {"*": [0, 1], "2": [3]}
    place = both["first_difference"]["token"]
    assert alone["token_ids"][:place] == changed["token_ids"][:place]
    assert alone["token_ids"][place] != changed["token_ids"][place]
    assert found.out.count("▸") == 3  # in both texts and in the sentence
    assert f"They part after {place} token" in found.out
    assert "experts *:0,1 2:3 masked" in found.out


def test_compare_of_what_changes_nothing(run: Any, files: Any) -> None:
    words = ["generate", files.moe, "--prompt", PROMPT, "--max-tokens", "4"]
    found = run(*words, "--experts-per-token", "2", "--compare")
    assert "all 4 tokens agree" in found.out
    assert "▸" not in found.out
    both = run(*words, "--experts-per-token", "2", "--compare", "--json").json
    assert both["first_difference"] is None


@pytest.mark.parametrize(("columns", "beside"), [(80, False), (120, True)])
def test_compare_goes_beside_where_there_is_room(
    run: Any, files: Any, monkeypatch: pytest.MonkeyPatch, columns: int, beside: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = run("generate", files.moe, "--prompt", PROMPT, "--experts-per-token", "1", "--compare")
    heads = [line for line in found.out.splitlines() if "usual routing" in line]
    assert ("1 expert per token" in heads[0]) is beside
    assert max(map(len, found.out.splitlines())) <= columns


def test_changes_reach_the_model(run: Any, files: Any) -> None:
    """Every token forced to the same two experts is every other expert masked."""
    words = ["generate", files.moe, "--prompt", PROMPT, "--max-tokens", "8", "--json"]
    forced = run(*words, "--force-experts", "*:2,5").json
    masked = run(*words, "--mask-experts", "*:0,1,3,4,6,7").json
    assert forced["token_ids"] == masked["token_ids"]
