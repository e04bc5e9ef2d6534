"""Plans and verifications as rows and small HTML tables, for the card, notebooks and the CLI."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moe_lens.compress.plan.plan import Plan
from moe_lens.compress.verification.use import Use
from moe_lens.compress.verification.verification import Loss, Verification

Row = tuple[str, ...]

_MOST_LAYERS = 24
"""Layers up to which the drift of each is a row."""
_LARGEST = 10


def plan_rows(plan: Plan) -> tuple[Row, list[Row]]:
    """Column names, and one row of text for each layer."""
    if plan.kind == "merge":
        names: Row = ("layer", "groups at T", "experts", "merged groups", "lowest pair")
        by_threshold = any(layer.groups_reached is not None for layer in plan.layers)
        rows: list[Row] = []
        for layer in plan.layers:
            merged = [group for group in layer.groups if group.merged]
            known = [group.similarity for group in merged if group.similarity is not None]
            rows.append(
                (
                    str(layer.layer),
                    "" if layer.groups_reached is None else str(layer.groups_reached),
                    f"{plan.model.num_experts} -> {len(layer.groups)}",
                    " ".join("+".join(map(str, group.experts)) for group in merged),
                    f"{min(known):.3f}" if known else "",
                )
            )
        if not by_threshold:
            names, rows = (names[0], *names[2:]), [(row[0], *row[2:]) for row in rows]
        return names, rows
    names, columns = ("layer",), [[str(layer.layer) for layer in plan.layers]]
    if plan.kind != "channels":
        names += ("experts", "removed")
        columns += [
            [f"{plan.model.num_experts} -> {len(layer.groups)}" for layer in plan.layers],
            [" ".join(map(str, layer.removed)) for layer in plan.layers],
        ]
    if plan.expert_width is not None:
        shares = plan.evidence.get("kept_importance", {})
        names += ("channels of each expert", "importance kept")
        columns += [
            [f"{plan.model.expert_width} -> {plan.expert_width}"] * len(plan.layers),
            [_percent(shares.get(str(layer.layer))) for layer in plan.layers],
        ]
    return names, [tuple(row) for row in zip(*columns, strict=True)]


def pair_rows(plan: Plan) -> tuple[Row, list[Row]]:
    """The least similar pair of every merged group, with both halves of its similarity."""
    names = ("layer", "experts", "similarity", "outputs", "overlap", "share of each")
    rows: list[Row] = [
        (
            str(layer.layer),
            "+".join(map(str, group.experts)),
            _number(group.similarity),
            _number(group.output_similarity),
            _number(group.activation_overlap),
            " ".join(f"{weight:.2f}" for weight in group.weights),
        )
        for layer in plan.layers
        for group in layer.groups
        if group.merged
    ]
    return names, rows


def loss_rows(verification: Verification) -> tuple[Row, list[Row]]:
    """One row for all text and one for each label."""
    names = (
        "text",
        "tokens",
        "perplexity before",
        "after",
        "change",
        "KL (nats)",
        "KL 99%",
        "same first choice",
    )
    rows = [_loss_row("all", verification.loss)]
    rows += [_loss_row(each.label, each.loss) for each in verification.labels]
    return names, rows


def _loss_row(name: str, loss: Loss) -> Row:
    return (
        name,
        str(loss.tokens),
        str(loss.perplexity_before),
        str(loss.perplexity_after),
        loss.change(),
        str(loss.kl),
        f"{loss.kl_99:.4g}",
        f"{loss.top1_agreement.value:.1%}",
    )


def size_rows(verification: Verification) -> tuple[Row, list[Row]]:
    """Bytes, parameters, memory and speed, before and after."""
    before, after = verification.size_before, verification.size_after
    use = verification.use
    return ("", "before", "after", "ratio"), [
        (
            "MB",
            f"{before.bytes / 1e6:.2f}",
            f"{after.bytes / 1e6:.2f}",
            f"{after.bytes / before.bytes:.3f}",
        ),
        (
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            f"{after.parameters / before.parameters:.3f}",
        ),
        *([] if use is None else _use_rows(use)),
    ]


def _use_rows(use: Use) -> list[Row]:
    memory, read, written = use.memory, use.reading, use.writing
    return [
        (
            "peak memory, MB",
            f"{memory.before / 1e6:.2f}",
            f"{memory.after / 1e6:.2f}",
            f"{memory.after / memory.before:.3f}",
        ),
        ("tokens/s read", f"{read.before:.0f}", f"{read.after:.0f}", f"{read.ratio:.2f}"),
        (
            "tokens/s written",
            f"{written.before:.0f}",
            f"{written.after:.0f}",
            f"{written.ratio:.2f}",
        ),
    ]


def drift_rows(verification: Verification) -> tuple[Row, list[Row]]:
    """The routing drift of every layer; of many layers, the ten that drift most."""
    drift = verification.drift
    names = ("layer", "weight routed elsewhere", "of it to removed experts")
    layers = drift.layers
    if len(layers) > _MOST_LAYERS:
        layers = tuple(sorted(layers, key=lambda each: -each.drift.value)[:_LARGEST])
    rows: list[Row] = []
    if drift.mean is not None:
        removed = sum(each.removed for each in drift.layers) / len(drift.layers)
        rows.append((f"mean of {len(drift.layers)}", str(drift.mean), f"{removed:.4g}"))
    rows += [(str(each.layer), str(each.drift), f"{each.removed:.4g}") for each in layers]
    return names, rows


def check_lines(verification: Verification) -> list[str]:
    """What else was found, in sentences: repetition, the stock load, what could not be given."""
    use, stock = verification.use, verification.stock_load
    if use is None:
        lines = [
            "Speed, memory and repetition are not measured: a model was streamed, its weights "
            "read layer by layer; verify it on a machine that holds it"
        ]
    else:
        text = use.repetition
        lines = [
            f"Repeated 4-grams in {text.prompts} greedy continuations: {text.before} before, "
            f"{text.after} after, change {text.change}"
        ]
    if verification.drift.reason is not None:
        lines.append(f"Routing drift is not given: {verification.drift.reason}")
    if stock is None:
        lines.append("The smaller model was given in memory, so no folder was checked")
    else:
        lines.append(
            f"Stock mlx_lm.load gives the logits of {stock.against}: largest difference "
            f"{stock.largest_difference:.3g} on {stock.tokens} tokens (largest logit "
            f"{stock.largest_logit:.3g})"
        )
    return lines


def markdown(names: Row, rows: Sequence[Row]) -> str:
    """A table for a model card."""
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def html(names: Row, rows: Sequence[Row]) -> str:
    """A table for a notebook."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def plan_html(plan: Plan) -> str:
    """The plan in a notebook."""
    return f"<p>{escape(plan.summary())}</p>{html(*plan_rows(plan))}" + (
        html(*pair_rows(plan)) if plan.kind == "merge" else ""
    )


def verification_html(verification: Verification) -> str:
    """The verification in a notebook."""
    warnings = "".join(f"<p><b>{escape(each)}</b></p>" for each in verification.warnings)
    return (
        f"<p>{escape(verification.summary())}</p>{warnings}"
        + html(*loss_rows(verification))
        + (html(*drift_rows(verification)) if verification.drift.layers else "")
        + html(*size_rows(verification))
        + "".join(f"<p>{escape(line)}</p>" for line in check_lines(verification))
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
