"""``moe-lens generate``: text, under changed routing if asked, beside the usual text if asked."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.errors import UsageError

from . import screen
from .models import load, read_prompt
from .options import (
    ExpertsPerToken,
    ForceExperts,
    Json,
    Kernel,
    MaskExperts,
    Model,
    Stream,
    TrustRemoteCode,
)
from .progress import working
from .quantities import some
from .routing import Routing

if TYPE_CHECKING:
    from moe_lens import ExpertRouter, Generation


def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            show_default=False,
            help="The prompt; - reads it from stdin.",
        ),
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", metavar="N", min=1, help="Write N tokens at most.")
    ] = 100,
    temp: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that make up P.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", show_default=False, help="Seed of the sampling.")
    ] = None,
    experts_per_token: ExpertsPerToken = None,
    mask_experts: MaskExperts = None,
    force_experts: ForceExperts = None,
    kernel: Kernel = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Show it beside the usual text, and where they part."),
    ] = False,
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            help="Take the prompt as it is, also where the model has a chat template.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    stream: Stream = None,
    json: Json = False,
) -> None:
    """Generate text, with other routing if asked.

    \b
    moe-lens generate demo --prompt "def fib(n):" --experts-per-token 1 --compare
    echo "def fib(n):" | moe-lens generate demo --prompt - --mask-experts 3:7,12

    As mlx_lm.generate does, the prompt goes through the model's chat template where it has one.
    """
    routing = Routing.read(experts_per_token, mask_experts, force_experts)
    if compare and not routing:
        raise UsageError(
            "--compare needs a change to compare with: give --experts-per-token, --mask-experts "
            "or --force-experts"
        )
    text = read_prompt(prompt)
    router = load(model, trust_remote_code, kernel, stream)
    with _changed(router, routing):
        pass  # refuses a change that cannot be, before anything is generated
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temp": temp,
        "top_p": top_p,
        "chat": router.tokenizer.has_chat_template and not ignore_chat_template,
        # Two texts are comparable only if they are drawn with the same random numbers.
        "seed": 0 if compare and seed is None else seed,
    }
    about = {"model": router.name, "prompt": text, "routing": routing.to_dict(), **options}
    if compare:
        _compare(router, routing, about, options, json)
    elif json:
        with _changed(router, routing):
            made = router.generate(text, **options)
        screen.emit_json(about | made.to_dict())
    else:
        _stream(router, routing, text, options)


def _changed(router: ExpertRouter, routing: Routing) -> AbstractContextManager[None]:
    return router.override(routing.overrides(router)) if routing else nullcontext()


def _stream(router: ExpertRouter, routing: Routing, text: str, options: dict[str, Any]) -> None:
    last = None
    try:
        with _changed(router, routing):
            for last in router.stream(text, **options):
                sys.stdout.write(screen.printable(last.text))
                sys.stdout.flush()
    finally:
        if last is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if last is not None:
        changed = f"; {routing.describe()}" if routing else ""
        screen.note(
            f"{some(last.generation_tokens, 'token')}, {last.generation_tps:.3g} per second, "
            f"after {some(last.prompt_tokens, 'token')} of prompt{changed}"
        )


def _compare(
    router: ExpertRouter,
    routing: Routing,
    about: dict[str, Any],
    options: dict[str, Any],
    as_json: bool,
) -> None:
    from .side_by_side import Pair

    baseline = _generate(router, Routing.read(None, None, None), about["prompt"], options)
    changed = _generate(router, routing, about["prompt"], options)
    pair = Pair(baseline, changed, router.tokenizer, routing.describe())
    if as_json:
        screen.emit_json(about | pair.to_dict())
    else:
        pair.show()


def _generate(
    router: ExpertRouter, routing: Routing, text: str, options: dict[str, Any]
) -> Generation:
    what = routing.describe() or "the usual routing"
    with working(f"generating with {what}"), _changed(router, routing):
        return router.generate(text, **options)
