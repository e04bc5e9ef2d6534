"""The trials of a choice as rows of text, from the plain values that a plan keeps of them."""

from __future__ import annotations

from typing import Any

Row = tuple[str, ...]


def choice_rows(choice: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Column names, and a row for each trial, the best first.

    Args:
        choice: What `Choice.to_dict` gives, and a plan keeps as ``evidence["choice"]``.
    """
    names = (
        "method",
        "experts",
        "channels",
        "per token",
        "MB",
        "KL (nats)",
        "95 % interval",
        "perplexity",
        "same first choice",
    )
    rows: list[Row] = [
        (
            str(trial["method"]),
            str(trial["num_experts"]),
            str(trial["expert_width"]),
            str(trial["experts_per_token"]),
            f"{trial['bytes'] / 1e6:.2f}",
            f"{trial['kl']['value']:.4g}",
            _interval(trial["kl"]),
            f"{trial['perplexity']['value']:.4g}",
            f"{trial['top1_agreement']['value']:.1%}",
        )
        for trial in choice["trials"]
    ]
    return names, rows


def skipped_lines(choice: dict[str, Any]) -> list[str]:
    """What was not tried, one sentence each."""
    return [f"{each['method']} was not tried: {each['reason']}" for each in choice["skipped"]]


def _interval(measure: dict[str, Any]) -> str:
    if measure["low"] is None:
        return ""
    return f"{measure['low']:.4g} to {measure['high']:.4g}"
