"""What ``trace.json`` says about a recording: model, corpus, settings, versions, definitions."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from moe_lens.fingerprint import canonical_sha256, tokenizer_sha256, weights_sha256
from moe_lens.override import Override
from moe_lens.trace.folder import FORMAT, VERSION

from .job import Job

if TYPE_CHECKING:
    from moe_lens.routed_model import RoutedModel

__all__ = ["DEFINITIONS", "model_identity", "recording_identity", "trace_header"]

DEFINITIONS = {
    "token_ids": "int32 [tokens]; ids in prompt order; pads are not recorded",
    "prompt": "int32 [tokens]; index of the prompt in prompts.json",
    "position": "int32 [tokens]; place of the token in its prompt, from 0",
    "expert_ids": (
        "uint8 or uint16 [MoE layers, tokens, k]; experts the token was routed to, slot 0 has the "
        "highest weight; 65535 marks a slot that a layer with a smaller k does not use"
    ),
    "expert_weights": (
        "float16 [MoE layers, tokens, k]; what the block multiplies the expert's output by, after "
        "every normalisation and scale"
    ),
    "router_logits": "float16 [MoE layers, tokens, router width]; before any score or bias",
}


def trace_header(router: RoutedModel, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything in ``trace.json`` that is known before the first forward."""
    info = router.info
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": info.to_dict() | model_identity(router),
        "layers": list(info.moe_layers),
        "num_experts": info.num_experts,
        "router_width": info.router_width,
        "experts_per_token": info.experts_per_token,
        "corpus": _corpus(job),
        "settings": settings | {"overrides": _overrides(router)},
        "versions": {
            "moe_lens": version("moe-lens"),
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "device": str(mx.default_device()),
        },
        "definitions": DEFINITIONS,
    }


def recording_identity(header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of a header that must agree for two recordings to be one.

    Names and notes are left out: the same corpus under another path is the same corpus.
    """
    model, corpus, versions = header["model"], header["corpus"], header["versions"]
    return {
        "model": {key: model[key] for key in model if key.endswith("_sha256")},
        "corpus": {key: corpus[key] for key in ("fingerprint", "tokens_sha256")},
        "settings": dict(header["settings"]),
        "versions": {key: versions[key] for key in ("mlx", "mlx_lm", "device")},
    }


def model_identity(router: RoutedModel) -> dict[str, str]:
    """Hashes of the model's config, weights and tokenizer (the latter two if it has a folder)."""
    identity = {"config_sha256": canonical_sha256(router.config)}
    if router.path is not None:
        identity["weights_sha256"] = weights_sha256(router.path)
        identity["tokenizer_sha256"] = tokenizer_sha256(router.path)
    return identity


def _corpus(job: Job) -> dict[str, Any]:
    digest = hashlib.sha256()
    for ids in job.tokens:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return {
        "name": job.corpus.name,
        "fingerprint": job.corpus.fingerprint,
        "tokens_sha256": digest.hexdigest(),
        "prompts": len(job.corpus),
        "tokens": sum(job.lengths),
        "labels": list(job.corpus.labels),
        "empty_prompts": job.lengths.count(0),
        "notes": [*job.corpus.notes, *job.notes],
    }


def _overrides(router: RoutedModel) -> dict[str, dict[str, Any]]:
    """The overrides in force as JSON, by layer; only the fields that are set."""
    return {
        str(layer): {
            field.name: _plain(getattr(override, field.name))
            for field in fields(Override)
            if not _is_unset(getattr(override, field.name))
        }
        for layer, override in sorted(router.overrides.items())
    }


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


def _plain(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    if hasattr(value, "items"):
        return {str(expert): float(number) for expert, number in value.items()}
    return np.asarray(value).tolist()
