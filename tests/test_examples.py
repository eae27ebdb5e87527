"""The examples of other people's loops run as they are told: short, and to their end."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.clusters import environment

EXAMPLES = sorted((ROOT / "jobs" / "examples").glob("*.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run(env: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 40


def test_a_plain_loop_learns(joined):
    said = run(joined, sys.executable, "jobs/examples/plain.py")
    assert float(re.search(r"accuracy ([\d.]+)", said)[1]) > 0.6


@pytest.mark.slow
def test_two_processes_of_torchrun(tmp_path):
    """As on a laptop: rank 0 starts a Ray, which wants a token, and rank 1 joins it."""
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    own = environment(HOME=str(tmp_path))  # where there is no token yet
    said = run(own, *TORCHRUN, *port, "jobs/examples/ddp.py")
    steps = re.findall(r"rank (\d): (\d+) steps, next epoch 2", said)
    assert sorted(rank for rank, _ in steps) == ["0", "1"] and len({n for _, n in steps}) == 1


def test_two_workers_of_ray_train(joined):
    assert "'epoch': 1" in run(joined, sys.executable, "jobs/examples/ray_train.py")


def test_a_set_of_hugging_face(joined):
    said = run(joined, sys.executable, "jobs/examples/huggingface.py")
    assert said.split() == ["True"] * 2


def test_lightnings_checkpoints(joined, tmp_path):
    pytest.importorskip("lightning")
    said = run(joined, sys.executable, "jobs/examples/lightning_trainer.py")
    assert "160 images, 160 different" in said
