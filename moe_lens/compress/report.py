"""Plans and verifications as rows and small HTML tables, for the card, notebooks and the CLI."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .plan import Plan
from .verification import Loss, Verification

Row = tuple[str, ...]


def plan_rows(plan: Plan) -> tuple[Row, list[Row]]:
    """Column names, and one row of text for each layer."""
    if plan.kind == "merge":
        names: Row = ("layer", "groups at T", "experts", "merged groups", "lowest pair")
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
        return names, rows
    names = ("layer", "experts", "removed")
    return names, [
        (
            str(layer.layer),
            f"{plan.model.num_experts} -> {len(layer.groups)}",
            " ".join(map(str, layer.removed)),
        )
        for layer in plan.layers
    ]


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
        f"{loss.top1_agreement.value:.1%}",
    )


def size_rows(verification: Verification) -> tuple[Row, list[Row]]:
    """Bytes, parameters and speed, before and after."""
    before, after = verification.size_before, verification.size_after
    speed = verification.speed
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
        ("tokens/s", f"{speed.before:.0f}", f"{speed.after:.0f}", f"{speed.ratio:.2f}"),
    ]


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
        + html(*size_rows(verification))
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
