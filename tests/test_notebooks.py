"""The notebooks run from top to bottom, and are committed with the outputs of a run."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


SMALLER = {
    # A writer more instead of five: each takes 2 s of CPU to start.
    "quickstart": {
        "demo:4000": "demo:400",
        '["write"].value = 6': '["write"].value = 2',
        "time.sleep(8)": "time.sleep(2)",
        "time.sleep(10)": "time.sleep(4)",
    },
    # Enough points for each figure to have a line. sweep/test_command has both libraries.
    "talk": {
        "demo:1000": "demo:40",
        "limit=1000": "limit=40",
        "actors=(1, 2, 4)": 'actors=(1, 2), backends=("opencv",)',
    },
}


@pytest.mark.parametrize(
    "path",
    # The talk's is a whole sweep, which tests/sweep tests in parts.
    [
        pytest.param(path, marks=pytest.mark.soak if path.stem == "talk" else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
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
def test_it_is_committed_with_the_outputs_of_a_run_and_nothing_of_its_machine(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("<iframe srcdoc=" in json.dumps(output) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = path.read_text()
    assert not re.findall(r"/(?:tmp|root|home|work|Users|var)/|\b\d+\.\d+\.\d+\.\d+\b", text)
