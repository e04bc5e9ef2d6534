"""The table of supported models: complete, and true of the models it describes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm.models
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING

from family_cases import MODES
from moe_lens.errors import UnsupportedModelError
from moe_lens.families import OVERRIDES, VALUES, all_supported, find_moe_layers, support
from tiny_models import BASE, build

MODELS = Path(mlx_lm.models.__file__).parent
HAS_EXPERTS = re.compile(r"\bSwitch(GLU|MLP)\(|class SparseMoeBlock")


def files_with_experts() -> set[str]:
    """The model files of mlx-lm that make routed experts, directly or through another file."""
    sources = {path.stem: path.read_text() for path in MODELS.glob("*.py")}
    imports = {name: set(siblings(text)) for name, text in sources.items()}
    found: set[str] = set()
    more = {name for name, text in sources.items() if HAS_EXPERTS.search(text)}
    while more:
        found |= more
        more = {name for name in set(sources) - found if imports[name] & more}
    return found - {"switch_layers"}


def siblings(source: str) -> Iterator[str]:
    """The files beside it that a model file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def values_at(config: dict[str, Any], key: str) -> Iterator[Any]:
    """Every value under `key` in a config.json, nested parts too."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from values_at(value, key)
        elif name == key:
            yield value


WITHOUT_EXPERTS = {"prism_hadamard_qwen35"}
"""Built on a file with experts, without any: its packs list plain linear layers only."""


def test_every_model_file_with_experts_has_a_tiny_model() -> None:
    tiny = {name.split("(")[0] for name in BASE}
    assert files_with_experts() - WITHOUT_EXPERTS == tiny


def test_the_table_lists_every_tiny_model_type_and_its_other_names() -> None:
    tiny = {name.split("(")[0] for name in BASE}
    other_names = {name for name, target in MODEL_REMAPPING.items() if target in tiny}
    listed = [each.model_type for each in all_supported()]
    assert len(listed) == len(set(listed))
    # Llava's checkpoints hold a dense Mistral 3.
    assert set(listed) == tiny | other_names - {"llava"}


@pytest.mark.parametrize("each", all_supported(), ids=lambda each: each.model_type)
def test_what_is_missing_has_a_reason(each) -> None:
    assert set(each.values) | set(each.without) >= set(VALUES[:6])
    assert set(each.overrides) | set(each.without) >= set(OVERRIDES)
    assert all(reason.strip() for reason in each.without.values())
    assert support(each.model_type) == each


@pytest.mark.parametrize("mode", ["float32", "4bit"])
@pytest.mark.parametrize("name", BASE)
def test_layers_are_described_truly(name: str, mode: str) -> None:
    model, config = build(name, **MODES[mode])
    listed = support(name.split("(")[0])
    arrays = dict(tree_flatten(model.parameters()))
    for layer in find_moe_layers(model):
        assert [layer.num_experts, layer.k] == [8, 1 if name == "llama4" else 2]
        assert list(values_at(config, listed.experts_key)) == [layer.num_experts]
        assert list(values_at(config, listed.k_key)) == [layer.k]
        for path in layer.router_parameters():
            assert arrays[path].shape[0] == layer.router_width
        for path in layer.expert_parameters():
            assert path.startswith(layer.path)
            assert layer.list_experts or arrays[path].shape[0] == layer.num_experts
        named = {layer.selection_bias_name, layer.per_expert_scale_name} - {None}
        assert named <= set(layer.router_parameters())
        assert experts_in(arrays, layer.path, set(layer.router_parameters())) == set(
            layer.expert_parameters()
        )


def experts_in(arrays: dict[str, Any], block: str, router: set[str]) -> set[str]:
    """The arrays below a block that belong to single experts, by their names and shapes."""
    below = {path for path in arrays if path.startswith(f"{block}.")}
    return {
        path
        for path in below - router
        if re.search(r"\.(switch_mlp|experts|switch_glu)\.", path)
        and not re.search(r"\.(shared_\w+|post_expert_norm)\.", path)
    }


def test_an_unknown_model_type_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(UnsupportedModelError, match=r"did you mean qwen3_moe\?"):
        support("qwen3-moe")
    with pytest.raises(UnsupportedModelError, match="not a model type that moe-lens knows;"):
        support("zzzzzz")


def test_other_names_are_told_apart_from_model_types() -> None:
    found = all_supported()
    assert sum(each.alias_of is None for each in found) == 54
    assert support("kimi_k2").alias_of == "deepseek_v3"
