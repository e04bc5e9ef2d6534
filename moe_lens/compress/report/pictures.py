"""The pictures of a plan that lie in the checkpoint it made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_lens.compress.merging.tree import EVIDENCE as TREE
from moe_lens.compress.plan.plan import Plan

FOLDER = "pictures"
"""A folder of their own: no loader looks there, and it is not copied to the next smaller model."""


@dataclass(frozen=True)
class Picture:
    """A picture file, by its path within the checkpoint, and what it shows."""

    file: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return {"file": self.file, "shows": self.text}


def write_pictures(plan: Plan, folder: Path) -> list[Picture]:
    """Write every picture that the plan has something for into `folder`/pictures.

    PNGs on a light background, 1280 pixels wide. Takes about a second.

    Raises:
        MoeLensError: A file cannot be written.
    """
    # matplotlib takes half a second to import, and whoever only plans needs no picture.
    from moe_lens.figures.choice import draw_choice
    from moe_lens.figures.merge_tree import draw_merge_tree
    from moe_lens.figures.picture_file import write_small
    from moe_lens.figures.plan import draw_plan
    from moe_lens.figures.saliency import draw_saliency

    wanted = [("plan.png", "What becomes of every expert, layer by layer", draw_plan)]
    if any(layer.saliency for layer in plan.layers):
        text = "How salient every expert is, and which were removed"
        wanted.append(("saliency.png", text, draw_saliency))
    if plan.evidence.get(TREE):
        text = "By what joins the experts of one layer were merged, and where that was cut"
        wanted.append(("dendrogram.png", text, draw_merge_tree))
    if plan.evidence.get("choice"):
        text = "What every method that was tried for this size loses"
        wanted.append(("methods.png", text, draw_choice))
    found = []
    for name, text, draw in wanted:
        write_small(draw(plan), folder / FOLDER / name)
        found.append(Picture(f"{FOLDER}/{name}", text))
    return found
