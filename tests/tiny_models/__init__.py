"""Tiny random models of every mixture-of-experts architecture in mlx-lm, as test fixtures.

``CONFIGS[name]`` is a ``config.json``; ``build(name)`` makes the model, ``save_checkpoint(name,
folder)`` writes it as a folder that ``mlx_lm.load`` opens. The configurations lie in one file per
kind of router: ``softmax``, ``sigmoid``, ``grouped``, ``special``; ``variants`` holds second
branches of the same code.
"""

from __future__ import annotations

from tiny_models.building import build, config_of, save_checkpoint
from tiny_models.configs import BASE, CONFIGS

__all__ = ["BASE", "CONFIGS", "build", "config_of", "save_checkpoint"]
