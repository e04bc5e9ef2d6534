"""Profiles: every sum against plain counting, addition, and files."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moe_lens.errors import MoeLensError, UsageError
from moe_lens.profile import OutputSums, Profile
from moe_lens.profile.profile import BLOCKS
from moe_lens.trace import NO_EXPERT, Routes
from route_cases import random_routes


@st.composite
def routed(draw: st.DrawFn) -> tuple[Routes, list[str | None]]:
    """Routes of up to 70 prompts (more than there are blocks), and labels for them."""
    width = draw(st.integers(2, 9))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=70))
    k = draw(st.integers(1, min(3, width)))
    routes = random_routes(
        draw(st.integers(0, 999)),
        layers=tuple(range(draw(st.integers(1, 3)))),
        width=width,
        k=k,
        lengths=tuple(lengths),
        uneven=k > 1 and draw(st.booleans()),
    )
    labels = draw(st.lists(st.sampled_from([None, "a", "b"]), min_size=70, max_size=70))
    return routes, labels[: len(lengths)]


def counted(routes: Routes, labels: list[str | None]) -> dict[str, Any]:
    """The same sums by loops over tokens, layers and slots, with nothing shared with the code."""
    layers, width = len(routes.layers), routes.router_width
    names = sorted({label for label in labels if label is not None})
    table: dict[str, Any] = {
        "counts": np.zeros((layers, width), int),
        "first_counts": np.zeros((layers, width), int),
        "weight_sums": np.zeros((layers, width)),
        "coactivation": np.zeros((layers, width, width), int),
        "transitions": np.zeros((max(layers - 1, 0), width, width), int),
        "label_tokens": np.zeros(len(names), int),
        "label_prompts": np.zeros(len(names), int),
        "label_counts": np.zeros((len(names), layers, width), int),
        "block_tokens": np.zeros(BLOCKS, int),
        "block_prompts": np.zeros(BLOCKS, int),
        "block_counts": np.zeros((BLOCKS, layers, width), int),
    }
    vocabulary: dict[tuple[int, int], int] = {}
    for row in range(len(routes)):
        prompt, token = int(routes.prompt[row]), int(routes.token_ids[row])
        block, label = prompt % BLOCKS, labels[prompt]
        begins = int(routes.position[row] == 0)
        table["block_tokens"][block] += 1
        table["block_prompts"][block] += begins
        if label is not None:
            table["label_tokens"][names.index(label)] += 1
            table["label_prompts"][names.index(label)] += begins
        before: list[int] = []
        for layer in range(layers):
            ids = [int(e) for e in routes.expert_ids[layer, row] if e != NO_EXPERT]
            table["first_counts"][layer, ids[0]] += 1
            for slot, expert in enumerate(ids):
                table["counts"][layer, expert] += 1
                table["weight_sums"][layer, expert] += routes.expert_weights[layer, row, slot]
                table["block_counts"][block, layer, expert] += 1
                if label is not None:
                    table["label_counts"][names.index(label), layer, expert] += 1
                for other in ids:
                    table["coactivation"][layer, expert, other] += 1
                for earlier in before:
                    table["transitions"][layer - 1, earlier, expert] += 1
                key = (token, layer * width + expert)
                vocabulary[key] = vocabulary.get(key, 0) + 1
            before = ids
    return table | {"vocabulary": vocabulary, "labels": tuple(names)}


def as_dictionary(profile: Profile) -> dict[tuple[int, int], int]:
    assert profile.vocabulary is not None
    entries = profile.vocabulary.tocoo()
    return {
        (int(row), int(column)): int(value)
        for row, column, value in zip(*entries.coords, entries.data, strict=True)
    }


def assert_same(one: Profile, two: Profile) -> None:
    for field in fields(Profile):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if field.name == "vocabulary":
            assert as_dictionary(one) == as_dictionary(two)
        elif field.name == "outputs":
            assert (left is None) == (right is None)
        elif isinstance(left, np.ndarray) and left.dtype.kind == "f":
            np.testing.assert_allclose(left, right, rtol=1e-12)
        else:
            assert np.array_equal(left, right), field.name


@settings(max_examples=60, deadline=None)
@given(routed())
def test_every_sum_is_what_counting_gives(case: tuple[Routes, list[str | None]]) -> None:
    routes, labels = case
    profile, expected = Profile.from_routes(routes, labels), counted(routes, labels)
    assert as_dictionary(profile) == expected.pop("vocabulary")
    for name, value in expected.items():
        found = getattr(profile, name)
        if name == "weight_sums":
            np.testing.assert_allclose(found, value, rtol=1e-12)
        else:
            assert np.array_equal(found, value), name
    assert profile.num_tokens == len(routes)
    assert profile.num_prompts == len(set(routes.prompt.tolist()))


@settings(max_examples=60, deadline=None)
@given(routed(), st.data())
def test_two_halves_add_up_to_the_whole(
    case: tuple[Routes, list[str | None]], data: st.DataObject
) -> None:
    """Cut anywhere, even inside a prompt; labels that only one half has are kept."""
    routes, labels = case
    cut = data.draw(st.integers(0, len(routes)))
    halves = [routes.rows(0, cut), routes.rows(cut, len(routes))]
    own = [[name if p in half.prompt else None for p, name in enumerate(labels)] for half in halves]
    parts = [Profile.from_routes(half, names) for half, names in zip(halves, own, strict=True)]
    seen = [name if p in routes.prompt else None for p, name in enumerate(labels)]
    whole = Profile.from_routes(routes, seen)
    assert_same(parts[0] + parts[1], whole)
    assert_same(parts[1] + parts[0], whole)
    assert_same(sum(parts[1:], start=parts[0]), whole)
    assert_same(0 + parts[0], parts[0])


def test_invariants() -> None:
    profile = Profile.from_routes(random_routes(lengths=(50,), k=3))
    assert (profile.counts.sum(axis=1) == 3 * profile.num_tokens).all()
    assert (profile.first_counts.sum(axis=1) == profile.num_tokens).all()
    diagonal = np.diagonal(profile.coactivation, axis1=1, axis2=2)
    assert np.array_equal(diagonal, profile.counts)
    assert np.array_equal(profile.transitions.sum(axis=2), 3 * profile.counts[:-1])
    assert np.array_equal(profile.transitions.sum(axis=1), 3 * profile.counts[1:])
    assert np.array_equal(profile.block_counts.sum(axis=0), profile.counts)


def test_uint8_ids_count_like_uint16() -> None:
    routes = random_routes(width=256, k=4)
    narrow = replace(routes, expert_ids=routes.expert_ids.astype(np.uint8))
    assert_same(Profile.from_routes(routes), Profile.from_routes(narrow))


def outputs(seed: int) -> OutputSums:
    random = np.random.default_rng(seed)
    return OutputSums(*(random.random(shape) for shape in ((3, 8), (3, 8), (3, 8, 4))))


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("vocabulary", [False, True])
def test_file_round_trip(tmp_path: Path, with_outputs: bool, vocabulary: bool) -> None:
    labels = ["b", None, "a", "b"]
    profile = Profile.from_routes(
        random_routes(), labels, model={"config_sha256": "x"}, vocabulary=vocabulary
    )
    profile = replace(profile, outputs=outputs(0) if with_outputs else None)
    profile.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    if vocabulary:
        assert_same(loaded, profile)
    else:
        assert loaded.vocabulary is None and np.array_equal(loaded.counts, profile.counts)
    if loaded.outputs is not None and profile.outputs is not None:
        assert np.array_equal(loaded.outputs.outputs, profile.outputs.outputs)
    assert_same(loaded + profile, profile + loaded) if vocabulary else None
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_output_sums_add() -> None:
    one, two = outputs(0), outputs(1)
    both = one + two
    for name in ("norms", "weighted_norms", "outputs"):
        assert np.array_equal(getattr(both, name), getattr(one, name) + getattr(two, name))


class TestRefusals:
    profile = Profile.from_routes(random_routes(), model={"config_sha256": "x"})

    def test_other_shape(self) -> None:
        with pytest.raises(UsageError, match="different models"):
            self.profile + Profile.from_routes(random_routes(width=9))

    def test_other_model(self) -> None:
        with pytest.raises(UsageError, match="differ in config_sha256"):
            self.profile + replace(self.profile, model={"config_sha256": "y"})

    def test_only_one_has_a_part(self) -> None:
        with pytest.raises(UsageError, match="only one of the two profiles has outputs sums"):
            self.profile + replace(self.profile, outputs=outputs(0))
        with pytest.raises(UsageError, match="has vocabulary sums"):
            self.profile + replace(self.profile, vocabulary=None)

    def test_not_a_profile(self) -> None:
        with pytest.raises(TypeError):
            self.profile + cast("Any", 1)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no profile"):
            Profile.load(tmp_path / "p.safetensors")
        self.profile.save(tmp_path / "p.safetensors")
        whole = (tmp_path / "p.safetensors").read_bytes()
        (tmp_path / "p.safetensors").write_bytes(whole[:-9])
        with pytest.raises(MoeLensError, match="is damaged"):
            Profile.load(tmp_path / "p.safetensors")
        save_file({"a": np.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(MoeLensError, match="no moe-lens profile"):
            Profile.load(tmp_path / "other.safetensors")
