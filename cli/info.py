"""``moe-lens info``: what a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import screen
from .models import load
from .options import Json, Model, TrustRemoteCode
from .quantities import count, percent, ranges, size

if TYPE_CHECKING:
    from moe_lens import ExpertRouter, ModelInfo


def info(model: Model, json: Json = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Layers, experts, router rule and sizes of a model.

    \b
    moe-lens info demo
    moe-lens info mlx-community/Qwen3-30B-A3B-4bit --json
    """
    router = load(model, trust_remote_code)
    if json:
        screen.emit_json(router.info.to_dict() | {"path": router.path, "notes": router.notes})
        return
    screen.show(screen.facts(_rows(router)))


def _rows(router: ExpertRouter) -> list[tuple[str, str]]:
    about = router.info
    rows = [
        ("model", f"{about.name} ({about.model_type})"),
        ("layers", _layers(about)),
        ("experts", _experts(about)),
        ("shared expert", "yes" if about.shared_expert else "none"),
        ("widths", _widths(about)),
        ("parameters", _parameters(about)),
        ("size", f"{size(about.bytes)}, {_format(about)}"),
        ("router", about.rule),
        ("family", f"{about.family}, block {about.block}"),
        ("can show", ", ".join(about.values)),
    ]
    rows += [("cannot", f"{name}: {reason}") for name, reason in about.missing.items()]
    rows += [("note", about.note)] if about.note else []
    return [*rows, ("folder", str(router.path))]


def _layers(about: ModelInfo) -> str:
    routed = about.moe_layers
    return f"{about.num_layers}, of which {len(routed)} have routed experts ({ranges(routed)})"


def _experts(about: ModelInfo) -> str:
    text = f"{about.num_experts} in a layer"
    if about.router_width > about.num_experts:
        text += f", {about.router_width - about.num_experts} zero experts"
    return f"{text}, {about.experts_per_token or 'an unknown number'} for each token"


def _widths(about: ModelInfo) -> str:
    parts = (
        ("hidden", about.hidden_size),
        ("expert", about.expert_width),
        ("vocabulary", about.vocab_size),
    )
    return ", ".join(f"{name} {number}" for name, number in parts if number is not None)


def _parameters(about: ModelInfo) -> str:
    active = about.active_parameters / about.parameters
    experts = about.expert_parameters / about.parameters
    return (
        f"{count(about.parameters)}; {count(about.active_parameters)} ({percent(active)}) active "
        f"for each token, {count(about.expert_parameters)} ({percent(experts)}) in experts"
    )


def _format(about: ModelInfo) -> str:
    if not about.quantization:
        return about.dtype
    bits, group = about.quantization.get("bits"), about.quantization.get("group_size")
    return f"{bits}-bit in groups of {group}, the rest {about.dtype}"
