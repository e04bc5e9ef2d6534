"""The example notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "what_do_my_experts_do.ipynb"


def outputs(notebook: Any, kind: str) -> list[str]:
    """What the cells showed in one format."""
    return [
        output["data"][kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert len(outputs(notebook, "image/png")) >= 5
    assert any("<table" in each for each in outputs(notebook, "text/html"))
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stdout"
    )
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    labels = rows.pop("masked")
    assert rows, said
    for label, changes in rows.items():
        # Experts named after a label are needed more for it than for any other.
        assert labels[max(range(len(labels)), key=lambda at: float(changes[at]))] == label, said


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
