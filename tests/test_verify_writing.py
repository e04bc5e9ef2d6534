"""Continuations of many beginnings at once, and the repetition counted in them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from family_cases import open_case
from moe_lens.compress.verification.repetition import beginnings, measure_repetition, repeated_share
from moe_lens.compress.verification.writing import continue_greedily
from moe_lens.corpus import Prompt
from moe_lens.router import ExpertRouter
from tiny_models import CONFIGS, save_checkpoint

STARTS = [[(7 * i + 11 * j + 1) % 120 for i in range(length)] for j, length in enumerate((9, 1, 9))]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> ExpertRouter:
    return ExpertRouter.from_pretrained(
        save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("writing") / "model")
    )


def test_together_the_same_as_alone(router: ExpertRouter) -> None:
    steps: list[int] = []
    found = continue_greedily(router, STARTS, 24, steps.append)
    alone = [router.generate(start, max_tokens=24) for start in STARTS]
    assert all(each.finish_reason == "length" for each in alone)
    assert found == [list(each.token_ids) for each in alone]
    assert len({tuple(each) for each in found}) == 3
    assert sum(steps) == 24 * 3


def test_a_continuation_ends_before_its_end_token(
    router: ExpertRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = continue_greedily(router, STARTS, 24)
    end = whole[0][5]
    monkeypatch.setattr(type(router.tokenizer), "eos_token_ids", {end})
    steps: list[int] = []
    found = continue_greedily(router, STARTS, 24, steps.append)
    for text, ended in zip(whole, found, strict=True):
        assert ended == text[: text.index(end) if end in text else None]
    assert len(found[0]) <= 5
    assert sum(steps) == 24 * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_writes_in_batches(name: str) -> None:
    """One batch against one row at a time, on the logits' own likeliest tokens."""
    starts = [STARTS[0], STARTS[2]]
    with open_case(name, "float32") as case:
        case.router.tokenizer = _NoEnd()
        together = continue_greedily(case.router, starts, 6)
        alone = [continue_greedily(case.router, [start], 6)[0] for start in starts]
        for start, text, other in zip(starts, together, alone, strict=True):
            assert len(text) == 6
            if text == other:
                continue
            # A batch rounds otherwise: where the texts part, both tokens were equally likely.
            place = next(n for n in range(6) if text[n] != other[n])
            logits = case.model(mx.array([start + text[:place]]))[0, -1]
            tokens = logits[mx.array([text[place], other[place]])]
            assert float(abs(tokens[0] - tokens[1])) <= 1e-4 * float(mx.abs(logits).max())


class _NoEnd:
    eos_token_ids: frozenset[int] = frozenset()


def test_repeated_share_counts_different_4_grams() -> None:
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 3, 4]) == 0.0
    assert repeated_share([1, 1, 1, 1, 1]) == 0.5
    assert repeated_share([7] * 64) == pytest.approx(60 / 61)
    assert repeated_share([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)
    assert repeated_share(list(range(64))) == 0.0


def test_a_model_against_itself_repeats_itself_as_often(router: ExpertRouter) -> None:
    found = measure_repetition(router, router, STARTS, new_tokens=24)
    shares = [repeated_share(text) for text in continue_greedily(router, STARTS, 24)]
    assert found.before.value == pytest.approx(sum(shares) / 3)
    assert found.before == found.after
    assert found.change.value == 0.0
    assert (found.tokens_before, found.tokens_after, found.prompts) == (72, 72, 3)


def test_beginnings_are_half_of_a_text_and_all_of_a_question() -> None:
    question = Prompt(None, ({"role": "user", "content": "?"},))
    answered = Prompt(None, (*(question.messages or ()), {"role": "assistant", "content": "!"}))
    prompts = [Prompt("long"), Prompt("short"), Prompt("one"), question, answered]
    tokens = [list(range(100)), [1, 2, 3, 4, 5], [1], list(range(50)), list(range(50))]
    found = beginnings(prompts, tokens)
    assert found == [list(range(32)), [1, 2], list(range(50)), list(range(25))]
    through_template = beginnings(prompts, tokens, chat_template=True)
    assert through_template == [*tokens[:2], tokens[3], list(range(25))]
    few = beginnings(prompts, tokens, count=2, seed=1)
    assert len(few) == 2
    assert all(start in found for start in few)
    assert few == beginnings(prompts, tokens, count=2, seed=1)


def test_the_seed_draws_the_beginnings() -> None:
    prompts = [Prompt(str(number)) for number in range(40)]
    tokens = [[number] * 4 for number in range(40)]
    drawn = [beginnings(prompts, tokens, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 16
