"""jobs/benchmarks/gpu.py, small and on the CPU, so that it works on the day that a GPU is there."""

import importlib.util
import json
import runpy
import sys

import pytest
import torch

from tests.conftest import ROOT

SCRIPT = ROOT / "jobs" / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.soak
def test_every_part_of_the_gpu_check_runs(session, gpu, tmp_path):
    given = gpu.Benchmark(output=str(tmp_path / "out"), images=80, actors=1)
    check = gpu.Check(benchmark=given, device="cpu", folder=tmp_path)
    for part in gpu.PARTS.values():
        part(check)
    gpu.write(check)
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [
        "train, overlap",
        "preprocess once",
        "train, stored",
        "predict",
        "loader, DataLoader",
        "loader, raypipe",
    ]
    assert all(row["images_per_s"] > 0 for row in rows)
    table = (tmp_path / "out" / "gpu.md").read_text().splitlines()
    assert len(table) == 4 + len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exited.value.code == 2 and "No CUDA GPU is here" in capsys.readouterr().out
