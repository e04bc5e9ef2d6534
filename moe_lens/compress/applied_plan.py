"""A plan that was made before, checked against the model it is to be applied to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.errors import UsageError

from .calibration.calibration import identify
from .plan.plan import Plan
from .plan.plan_json import read_plan, validate

if TYPE_CHECKING:
    from moe_lens.router import ExpertRouter


def applicable(plan: Plan | str | Path, router: ExpertRouter) -> Plan:
    """The plan, read and checked against the model it is to be applied to.

    Raises:
        UsageError: It does not add up, or was made for another checkpoint.
    """
    found = plan if isinstance(plan, Plan) else read_plan(plan)
    validate(found)
    model = identify(router)
    if found.model.fingerprint != model.fingerprint:
        raise UsageError(
            f"the plan was made for another checkpoint ({found.model.name}) than {model.name}: "
            "their fingerprints differ; make a plan for this one"
        )
    return found
