"""A plan applied to the checkpoint it was made from, without measuring what it costs."""

from __future__ import annotations

from pathlib import Path

from moe_lens.checkpoint_files.unchanged import FolderState
from moe_lens.telling import Progress, Say

from .checkpoint.checkpoint import write_checkpoint
from .checkpoint.content import check_format
from .checkpoint.same_parameters import check_same_parameters
from .checkpoint.tensor_file import SHARD_BYTES
from .hugging_face.exported import check_exportable
from .plan.plan import Plan
from .plan.plan_json import read_plan, validate
from .report.commands import commands
from .report.report_file import write_report
from .requests import writing_request
from .resuming.output_place import check_output
from .resuming.request import Fact
from .resuming.working import working_at
from .tensors.parent import open_parent


def write(
    plan: Plan | str | Path,
    source: str | Path,
    output: str | Path,
    *,
    format: str = "mlx",
    force: bool = False,
    resume: bool = False,
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
        format: ``mlx``, or ``hf`` for names and tensors as Hugging Face transformers has them.
        force: Replace a model that stands at `output`, once the new one is complete.
        resume: Go on with what a stopped run of the same call has written. Otherwise that is
            removed.
        shard_bytes: Largest weight file.
        progress: Called with bytes written and bytes in all.
        say: Called with sentences a user should see.

    Raises:
        UsageError: The plan is for another checkpoint, or the output is refused.
        MoeLensError: The disk is full or cannot be written.
    """
    checked = plan if isinstance(plan, Plan) else read_plan(plan)
    validate(checked)
    check_format(format, per_layer=checked.per_layer)
    parent = open_parent(source, revision=revision, trust_remote_code=trust_remote_code)
    if format == "hf":
        check_exportable(parent, changed=checked.changes_experts)
    folder = Path(output).expanduser().absolute()
    check_output(folder, parent.path, force=force or resume)
    settings: dict[str, Fact] = {"bytes of a weight file": shard_bytes, "--format": format}
    request = writing_request(source, FolderState.of(parent.path), checked, settings)
    with working_at(folder, request, resume=resume, force=force, say=say) as work:
        if work.finished:
            return folder
        write_checkpoint(
            parent,
            checked,
            work.model,
            format=format,
            shard_bytes=shard_bytes,
            whole=work.shards,
            progress=progress,
            say=say,
        )
        if format == "hf":
            check_same_parameters(work.model, parent.path, checked)
        again = commands(checked, folder.name, format=format, trust_remote_code=trust_remote_code)
        write_report(
            work.model,
            parent,
            checked,
            again,
            notes=parent.unread.notes(format),
            request=request.sha256,
            layout=format,
        )
    return folder
