"""The Python file that goes with a checkpoint whose layers keep different numbers of experts.

It is `unequal_layers`, byte for byte: fixed text, which reads nothing but config.json.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.tensors.parent import Parent
from moe_lens.errors import UnsupportedModelError

from .config_keys import places_of
from .unequal_layers import KEY

NAME = "unequal_layers.py"


def name_counts(config: dict[str, Any], parent: Parent, plan: Plan, keys: set[str]) -> None:
    """Say in `config` how many experts each layer keeps, and which file builds them.

    Args:
        config: Of the smaller model; says the most experts of any layer under `keys`.
        parent: The checkpoint.
        plan: With unequal layers.
        keys: What `config` calls the number of experts.

    Raises:
        UnsupportedModelError: The parent is built by a file of its own.
    """
    check_no_own_file(parent.config)
    blocks = {}
    for layer in parent.layers:
        planned = plan.layer(layer.layer)
        assert planned is not None
        blocks[layer.path] = len(planned.groups)
    config["model_file"] = NAME
    config[KEY] = {
        "most": plan.num_experts,
        "keys": [list(place) for place in places_of(config, keys, plan.num_experts)],
        "blocks": blocks,
    }


def write_model_file(folder: Path) -> None:
    """Write the file beside the weights."""
    content = files(__package__).joinpath(NAME).read_bytes()
    (folder / NAME).write_bytes(content)


def forget_compiled(folder: Path) -> None:
    """Take away what Python kept of the file when the folder was loaded to be verified."""
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def check_no_own_file(config: dict[str, Any]) -> None:
    """Raise UnsupportedModelError where the parent is built by a file of its own."""
    if config.get("model_file"):
        raise UnsupportedModelError(
            f"this model is built by a file of its own ({config['model_file']}), in whose place no "
            "other can be put; give all layers one number of experts (leave --per-layer out)"
        )


def is_ours(config: dict[str, Any]) -> bool:
    """Whether `config` was made by `name_counts`."""
    return config.get("model_file") == NAME and KEY in config
