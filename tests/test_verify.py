"""The measured loss against independent numpy calculations, and what is refused or warned of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moe_lens.bootstrap import Bootstrap, Measure
from moe_lens.compress import LossTooLargeError, Verification, verify
from moe_lens.compress.calibration.held_out import check_held_out
from moe_lens.compress.verification.losses import Comparison, compare
from moe_lens.compress.verification.reading_cost import cost_sample, reading_cost
from moe_lens.compress.verification.verification import Loss
from moe_lens.compress.verification.verify import loss
from moe_lens.corpus import Corpus, Prompt, read_corpus
from moe_lens.errors import CaptureError, UsageError
from moe_lens.router import ExpertRouter
from moe_lens.streaming import Batch, Passed
from tiny_models import save_checkpoint
from twins import write_words

TOKENS = [
    [(7 * i + 3 * j) % 126 for i in range(length)] for j, length in enumerate((9, 1, 0, 30, 2))
]


def open_tiny(folder: Path, seed: int = 0) -> ExpertRouter:
    return ExpertRouter.from_pretrained(save_checkpoint("qwen3_moe", folder, seed=seed))


def log_probabilities(router: ExpertRouter, tokens: list[int]) -> np.ndarray:
    """[len - 1, vocab] in float64, of the positions whose next token is known."""
    logits = np.array(router.forward([tokens]))[0, :-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_losses_equal_a_float64_calculation_prompt_by_prompt(tmp_path: Path) -> None:
    first, second = open_tiny(tmp_path / "a"), open_tiny(tmp_path / "b", seed=1)
    [found] = compare(first.forwards, [second.forwards], TOKENS, 128)
    assert found.prompt.tolist() == [0] * 8 + [3] * 29 + [4]
    for prompt in (0, 3, 4):
        tokens = TOKENS[prompt]
        p, q = log_probabilities(first, tokens), log_probabilities(second, tokens)
        places = np.arange(len(tokens) - 1), np.asarray(tokens[1:])
        rows = found.prompt == prompt
        np.testing.assert_allclose(found.nll_before[rows], -p[places], rtol=1e-5)
        np.testing.assert_allclose(found.nll_after[rows], -q[places], rtol=1e-5)
        np.testing.assert_allclose(found.kl[rows], (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)
        np.testing.assert_array_equal(found.same_top1[rows], p.argmax(-1) == q.argmax(-1))


def test_what_reading_costs_is_measured_on_the_longest_prompts(tmp_path: Path) -> None:
    first, second = open_tiny(tmp_path / "a"), open_tiny(tmp_path / "b", seed=1)
    sample = cost_sample(TOKENS)
    assert sorted(map(len, sample)) == [2, 9, 30]
    assert list(map(len, cost_sample([range(n) for n in (9, 5000, 3000)]))) == [5000]
    read: list[int] = []
    cost = reading_cost(first.forward, second.forward, sample, 128, read.append)
    assert sum(read) == 41
    assert cost.speed.before > 0 and cost.speed.after > 0
    # The logits of all 41 tokens in float32 are in use at once; the model itself is counted apart.
    assert min(cost.working_before, cost.working_after) >= 41 * 128 * 4


def test_kl_of_a_token_that_is_ruled_out_is_no_nan() -> None:
    def plain(batches: Sequence[Batch], passed: Passed | None) -> list[mx.array]:
        return [mx.zeros((*batch.ids.shape, 4)) for batch in batches]

    def ruled_out(batches: Sequence[Batch], passed: Passed | None) -> list[mx.array]:
        never = mx.array([-float("inf"), 0.0, 0.0, 0.0])
        return [logits + never for logits in plain(batches, passed)]

    [found] = compare(ruled_out, [plain], [[1, 2, 3]], 4)
    np.testing.assert_allclose(found.kl, math.log(4 / 3), rtol=1e-6)
    [found] = compare(plain, [ruled_out], [[1, 2, 3]], 4)
    assert np.isinf(found.kl).all()


def test_measures_of_known_tokens() -> None:
    kl = np.arange(101.0)[::-1]
    nll = np.log(np.repeat([2.0, 8.0], (50, 51)))
    prompt = np.repeat(np.arange(10), (10, 10, 10, 10, 10, 10, 10, 10, 10, 11))
    tokens = Comparison(prompt, nll, nll + np.log(1.5), kl, kl < 25.0)
    found = loss(tokens)
    assert found.kl.value == pytest.approx(50.0)
    assert found.kl_99 == pytest.approx(99.0)
    assert found.perplexity_before.value == pytest.approx(2 ** (50 / 101) * 8 ** (51 / 101))
    assert found.perplexity_ratio.value == pytest.approx(1.5)
    assert found.perplexity_ratio.standard_error == pytest.approx(0.0, abs=1e-12)
    assert found.top1_agreement.value == pytest.approx(25 / 101)
    assert (found.prompts, found.tokens) == (10, 101)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return read_corpus(write_words(tmp_path / "words.jsonl", 12, 5, labels="abc"))


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """A model against itself, on two prompts."""
    folder = tmp_path_factory.mktemp("equal")
    router = open_tiny(folder / "model")
    return verify(router, router, read_corpus(write_words(folder / "words.jsonl", 2, 5)))


def test_a_model_lost_nothing_against_itself(tmp_path: Path, corpus: Corpus) -> None:
    router = open_tiny(tmp_path / "model")
    seen: list[tuple[int, int]] = []
    found = verify(router, router, corpus, progress=lambda *each: seen.append(each))
    assert found.loss.kl == Measure(0.0, 0.0, 0.0, 0.0)
    assert found.loss.top1_agreement.value == 1.0
    assert found.loss.perplexity_ratio.value == 1.0
    assert found.loss.perplexity_before == found.loss.perplexity_after
    assert found.loss.tokens == 12 * 39
    assert found.warnings == ()
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1]
    assert set(total) == {total[0]}
    # 12 prompts of 40 tokens are read, 12 beginnings continued by both models, 2 of them again.
    assert total[0] == 2 * 480 + 2 * (12 + 2) * 64
    assert found.drift.mean == Measure(0.0, 0.0, 0.0, 0.0)
    assert found.use.repetition.change == Measure(0.0, 0.0, 0.0, 0.0)
    assert found.stock_load is not None
    assert found.stock_load.largest_difference == 0.0
    assert found.size_before.bytes == router.info.bytes


def test_another_model_is_a_large_loss(tmp_path: Path, corpus: Corpus) -> None:
    folders = [save_checkpoint("qwen3_moe", tmp_path / str(s), seed=s) for s in (0, 1)]
    found = verify(folders[0], folders[1], corpus)
    assert found.loss.kl.value > 0.1
    assert found.loss.kl_99 > found.loss.kl.value
    assert any("KL divergence" in warning for warning in found.warnings)
    text = found.to_json()
    plain = json.loads(text)
    assert plain["loss"]["kl"]["value"] == found.loss.kl.value
    assert plain["loss"]["kl_99"] == found.loss.kl_99
    assert plain["memory"]["before"] > found.use.memory.weights_before == found.size_before.bytes
    for speed in plain["tokens_per_second"].values():
        assert speed["ratio"] == pytest.approx(speed["after"] / speed["before"])
        assert speed["before"] > 0
    assert plain["original"] == "0"
    assert str(tmp_path) not in text
    assert set(plain["definitions"]) >= {"perplexity", "kl", "top1_agreement", "uncertainty"}
    assert plain["device"]
    assert "KL divergence" in found._repr_html_()
    assert "KL(original || compressed)" in found.definition


def test_labels_are_measured_apart_and_make_up_the_whole(tmp_path: Path, corpus: Corpus) -> None:
    first, second = open_tiny(tmp_path / "a"), open_tiny(tmp_path / "b", seed=1)
    found = verify(first, second, corpus)
    assert [each.label for each in found.labels] == ["a", "b", "c"]
    assert sum(each.loss.tokens for each in found.labels) == found.loss.tokens
    mean = np.average(
        [each.loss.kl.value for each in found.labels],
        weights=[each.loss.tokens for each in found.labels],
    )
    np.testing.assert_allclose(mean, found.loss.kl.value)


def test_the_same_seed_gives_the_same_intervals(tmp_path: Path, corpus: Corpus) -> None:
    first, second = open_tiny(tmp_path / "a"), open_tiny(tmp_path / "b", seed=1)
    few = corpus.sample(4, 0)
    a, b, c = (verify(first, second, few, seed=seed).loss.kl for seed in (0, 0, 1))
    assert a == b
    assert a.value == c.value
    assert a.standard_error != c.standard_error


def test_bootstrap_finds_the_standard_error_of_a_mean() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3.0, 2.0, 400)
    prompt = np.arange(400)
    found = Bootstrap(prompt, resamples=4000).measure(values)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 20, rel=0.05)
    assert found.low == pytest.approx(found.value - 1.96 * values.std() / 20, rel=0.02)
    assert found.high == pytest.approx(found.value + 1.96 * values.std() / 20, rel=0.02)


def test_bootstrap_draws_prompts_not_tokens() -> None:
    """Ten copies of every token teach nothing new, so the error must not shrink."""
    generator = np.random.default_rng(0)
    values = generator.normal(0.0, 1.0, 100)
    once = Bootstrap(np.arange(100)).measure(values)
    often = Bootstrap(np.repeat(np.arange(100), 10)).measure(np.repeat(values, 10))
    assert often == Measure(
        pytest.approx(once.value),
        *(pytest.approx(v) for v in (once.standard_error, once.low, once.high)),
    )


def test_long_prompts_weigh_more() -> None:
    """Every resample is a ratio of its own: its sums over its own number of tokens."""
    prompt = np.repeat(np.arange(3), (1, 10, 100))
    values = np.repeat([5.0, 1.0, 2.0], (1, 10, 100))
    found = Bootstrap(prompt, resamples=20000).measure(values)
    every = list(product(range(3), repeat=3))
    sums, sizes = np.array([5.0, 10.0, 200.0]), np.array([1, 10, 100])
    means = [sums[list(draw)].sum() / sizes[list(draw)].sum() for draw in every]
    assert found.value == pytest.approx(215 / 111)
    assert found.standard_error == pytest.approx(np.std(means), rel=0.03)
    assert found.low == min(means)  # 1 in 27 resamples, more than 2.5 %


def test_one_prompt_has_no_interval() -> None:
    found = Bootstrap(np.zeros(5, np.int64)).measure(np.arange(5.0))
    assert found == Measure(2.0)
    assert str(found) == "2"


def corpus_of(*texts: str) -> Corpus:
    return Corpus("texts", tuple(Prompt(text) for text in texts))


LONG = "It was the best of times, it was the worst of times, it was the age of wisdom"


@pytest.mark.parametrize(
    ("learn", "test", "message"),
    [
        (("a", "b"), ("a", "b"), "is the text that calibrates"),
        (("a", "b"), ("b", "c"), "1 of 2 prompts"),
        ((" b ",), ("b",), "1 of 1 prompts"),
        ((f"Once: {LONG}!",), ("c", LONG), "1 of 2 prompts"),
        ((LONG,), (f"Once: {LONG}!", "c"), "1 of 2 prompts"),
    ],
)
def test_text_that_calibrated_is_refused(
    learn: tuple[str, ...], test: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_held_out(corpus_of(*learn), corpus_of(*test))


def test_text_that_only_resembles_is_taken() -> None:
    check_held_out(corpus_of("1 + 1 =", "abc"), corpus_of("1 + 1 = 2", "ab", ""))
    check_held_out(corpus_of(""), corpus_of("", "a"))


def test_chats_are_compared_too() -> None:
    chat = Prompt(None, ({"role": "user", "content": "hello"},))
    with pytest.raises(UsageError, match="1 of 2"):
        check_held_out(Corpus("a", (chat, Prompt("x"))), Corpus("b", (Prompt("y"), chat)))


def test_nothing_to_predict(tmp_path: Path) -> None:
    router = open_tiny(tmp_path / "model")
    with pytest.raises(CaptureError, match="no prompt of texts has two tokens"):
        verify(router, router, corpus_of("w1", "w2"))


def test_models_of_two_vocabularies(tmp_path: Path) -> None:
    router = open_tiny(tmp_path / "model")
    other = open_tiny(tmp_path / "other")
    other.model.lm_head.weight = other.model.lm_head.weight[:100]
    with pytest.raises(UsageError, match="a vocabulary of 100 tokens"):
        verify(router, other, corpus_of("w1 w2 w3"))


@pytest.mark.parametrize(
    ("ratio", "kl", "count"),
    [(1.0, 0.01, 0), (1.10, 0.1, 0), (1.2, 0.01, 1), (1.2, 0.5, 2), (math.nan, math.inf, 2)],
)
def test_warnings(ratio: float, kl: float, count: int, equal: Verification) -> None:
    loss: Loss = replace(equal.loss, perplexity_ratio=Measure(ratio), kl=Measure(kl))
    found = replace(equal, loss=loss)
    assert len(found.warnings) == count
    json.loads(found.to_json())
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Measure(0.2, 0.05, 0.1, 0.3), True),
        (Measure(0.2), True),
        (Measure(0.2, 0.2, -0.1, 0.5), False),
        (Measure(0.05, 0.01, 0.03, 0.07), False),
        (Measure(-0.3, 0.01, -0.32, -0.28), False),
    ],
)
def test_repetition_is_warned_of_when_it_is_sure(
    change: Measure, said: bool, equal: Verification
) -> None:
    assert equal.use is not None
    repetition = replace(equal.use.repetition, change=change)
    found = replace(equal, use=replace(equal.use, repetition=repetition))
    assert [text for text in found.warnings if "repeats itself" in text] == list(found.warnings)
    assert len(found.warnings) == said


@pytest.mark.parametrize(
    ("kl", "most", "passes"),
    [
        (0.1, None, True),
        (0.1, 0.1, True),
        (0.1, 0.0999, False),
        (0.0, 0.0, True),
        (math.nan, 1.0, False),
        (math.inf, 1.0, False),
    ],
)
def test_the_gate(kl: float, most: float | None, passes: bool, equal: Verification) -> None:
    found = replace(equal, loss=replace(equal.loss, kl=Measure(kl, 0.02, 0.0, 0.2)))
    if passes:
        found.check(most)
        return
    with pytest.raises(LossTooLargeError, match=f"more than the {most:g} that --max-kl") as error:
        found.check(most)
    assert error.value.verification is found
    json.dumps(error.value.evidence, allow_nan=False)
