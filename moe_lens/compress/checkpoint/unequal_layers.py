"""A model of mlx-lm whose layers keep different numbers of experts.

mlx-lm builds all layers from one number of experts. Here it builds the model once for each number
that `unequal_experts` of config.json names, and every layer takes its block from the model that
was built with its number. Nothing of an architecture is written down here, there are no weights in
this file, and it reads nothing but the config. mlx-lm loads it for ``trust_remote_code=True``.
"""

from __future__ import annotations

import copy
from typing import Any

from mlx_lm.utils import _get_classes

KEY = "unequal_experts"


class ModelArgs:
    """The whole config, since the stock arguments know one number of experts only."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """What mlx-lm calls with the content of config.json."""
        return cls(config)


def Model(args: ModelArgs) -> Any:  # noqa: N802
    """The stock model of this type, with as many experts in each layer as config.json says."""
    return resize_layers(_built(args.config), args.config)


def resize_layers(model: Any, config: dict[str, Any]) -> Any:
    """Give every block the number of experts that config.json names for it."""
    said = config[KEY]
    for count in sorted(set(said["blocks"].values()) - {said["most"]}):
        other = _built(_with_experts(config, count))
        for path, experts in said["blocks"].items():
            if experts == count:
                outer, _, name = path.rpartition(".")
                _put(_find(model, outer), name, _find(other, path))
    return model


def _built(config: dict[str, Any]) -> Any:
    """What stock mlx-lm builds from a config; its first random weights are never computed."""
    config = copy.deepcopy(config)
    model, arguments = _get_classes(config)
    return model(arguments.from_dict(config))


def _with_experts(config: dict[str, Any], count: int) -> dict[str, Any]:
    """A copy of the config with another number of experts, wherever it names the most."""
    config = copy.deepcopy(config)
    most = config[KEY]["most"]
    for *outer, key in config[KEY]["keys"]:
        part: Any = config
        for name in outer:
            part = part[name]
        old = part[key]
        if isinstance(old, list):
            part[key] = [count if each == most else each for each in old]
        else:
            part[key] = count
    return config


def _find(module: Any, path: str) -> Any:
    """The module at a path such as ``model.layers.3.mlp``."""
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _put(outer: Any, name: str, module: Any) -> None:
    """Replace a module of `outer`, which may be a list."""
    if name.isdigit():
        outer[int(name)] = module
    else:
        setattr(outer, name, module)
