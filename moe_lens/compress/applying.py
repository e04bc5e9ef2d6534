"""A plan applied to the checkpoint it was made from, without measuring what it costs."""

from __future__ import annotations

from pathlib import Path

from .checkpoint.checkpoint import write_checkpoint
from .checkpoint.staging import check_output, staged
from .checkpoint.tensor_file import SHARD_BYTES
from .plan.plan import Plan
from .plan.plan_json import read_plan, validate
from .report.commands import commands
from .report.report_file import write_report
from .telling import Progress, Say
from .tensors.parent import open_parent


def write(
    plan: Plan | str | Path,
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Apply a plan to the checkpoint it was made from; nothing is measured.

    Model card, report and pictures say so.

    The folder appears when it is complete, or not at all. Memory: the largest tensor and, where
    experts are merged, one group of them in float32.

    Args:
        plan: A plan, or the path of its JSON.
        source: The parent: a folder, a hub id, or ``demo``.
        output: The folder to make.
        force: Replace a model that stands at `output`, once the new one is complete.
        shard_bytes: Largest weight file.
        progress: Called with bytes written and bytes in all.
        say: Called with sentences a user should see.

    Raises:
        UsageError: The plan is for another checkpoint, or the output is refused.
        MoeLensError: The disk is full or cannot be written.
    """
    checked = plan if isinstance(plan, Plan) else read_plan(plan)
    validate(checked)
    parent = open_parent(source, revision=revision, trust_remote_code=trust_remote_code)
    folder = Path(output).expanduser().absolute()
    check_output(folder, parent.path, force=force)
    with staged(folder, force=force, say=say) as partial:
        write_checkpoint(
            parent, checked, partial, shard_bytes=shard_bytes, progress=progress, say=say
        )
        again = commands(checked, folder.name, trust_remote_code=trust_remote_code)
        write_report(partial, parent, checked, again)
    return folder
