"""``moe-lens doctor``: what this machine gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from . import screen
from .options import Json
from .progress import working
from .quantities import size

if TYPE_CHECKING:
    from moe_lens.machine.doctor import Diagnosis
    from moe_lens.machine.facts import Device, Memory, Products
    from moe_lens.machine.hub import Hub


def doctor(json: Json = False) -> None:
    """Show what this machine gives: versions, device, speed.

    \b
    moe-lens doctor

    Exits with 1 if something keeps moe-lens from working.
    """
    with working("looking at this machine"):
        from moe_lens.machine.doctor import examine

        found = examine()
    if json:
        screen.emit_json(found.to_dict() | {"terminal": screen.terminal()})
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    rows = [
        ("versions", ", ".join(f"{name} {at or '(none)'}" for name, at in found.versions.items())),
        ("system", found.system),
        ("device", _device(found.device)),
        ("memory", _memory(found.memory)),
        ("products", _products(found.products)),
        ("routing", found.kernel),
        ("hub", _hub(found.hub)),
        ("cache", _cache(found)),
        ("demo model", "there" if found.demo else "missing from this installation"),
        ("terminal", _terminal(screen.terminal())),
    ]
    screen.show(screen.facts(rows))
    if found.cached_models:
        columns = ("cached model", "size", "model type", "moe-lens")
        cached = [
            (each.name, size(each.bytes), each.model_type or "-", "yes" if each.supported else "no")
            for each in found.cached_models
        ]
        screen.show("", screen.table(columns, cached, right=("size",)))
    for advice in found.advice:
        screen.show("", advice.text)
        screen.commands(*advice.commands)
    for sentence in found.problems:
        screen.error(sentence)


def _device(device: Device | None) -> str:
    if device is None:
        return "unknown"
    kinds = [name for name, there in (("Metal", device.metal), ("CUDA", device.cuda)) if there]
    return f"{device.default} ({device.name}); {' and '.join(kinds) or 'no Metal, no CUDA'}"


def _memory(memory: Memory) -> str:
    total, free = (
        "unknown" if each is None else size(each) for each in (memory.total, memory.available)
    )
    return f"{total}, {free} available"


def _products(products: Products | None) -> str:
    if products is None:
        return "not measured"
    blas = ""
    if products.blas:
        kind = "the reference BLAS" if products.reference else products.blas
        blas = f" with {kind}"
    return (
        f"MLX {products.mlx:.3g} GFLOP/s{blas}; NumPy {products.numpy:.3g} GFLOP/s "
        f"(float32, {products.size} x {products.size})"
    )


def _hub(hub: Hub) -> str:
    states = {True: "reachable", False: "not reachable", None: "offline"}
    return f"{hub.endpoint} {states[hub.reachable]} ({hub.detail})"


def _cache(found: Diagnosis) -> str:
    if not found.cached_models:
        return f"no models in {found.cache_folder}"
    total = sum(each.bytes for each in found.cached_models)
    return f"{len(found.cached_models)} models, {size(total)}, in {found.cache_folder}"


def _terminal(terminal: dict[str, Any]) -> str:
    if not terminal["interactive"]:
        return "none: stdout is not a terminal, so no colours and no line breaks of our own"
    known = {None: "no colours", "standard": "16 colours", "256": "256 colours"}
    colours = known.get(terminal["colours"], terminal["colours"])
    return f"{terminal['width']} columns, {colours}, {terminal['encoding']}"
