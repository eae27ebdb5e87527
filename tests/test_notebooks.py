"""The notebooks run from top to bottom, as a reader runs them, and hold no outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


SMALLER = {
    "quickstart": {"demo:4000": "demo:1200"},
    # Enough points for each figure to have a line. sweep/test_command has both libraries.
    "talk": {
        "demo:160": "demo:40",
        "limit=160": "limit=40",
        "actors=(1, 2, 4)": 'actors=(1, 2), backends=("opencv",)',
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    for large, small in SMALLER[path.stem].items():
        assert any(large in cell.source for cell in notebook.cells), large
        for cell in notebook.cells:
            cell.source = cell.source.replace(large, small)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    shown = json.dumps([cell["outputs"] for cell in notebook.cells if cell.cell_type == "code"])
    assert "<iframe srcdoc=" in shown or "application/vnd.jupyter.widget-view+json" in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
