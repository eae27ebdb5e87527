"""A training that loses images, a worker, its driver or a node has every row once all the same."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from raypipe.models import checkpoint as checkpoints
from raypipe.run.console import attempt, goes_on
from raypipe.train import epochs as epochs_module
from raypipe.train.attempts import run
from raypipe.train.result import Outcome, verdict_on
from raypipe.train.settings import Settings
from tests.conftest import ROOT
from tests.support.clusters import environment, head, kill_all, listed_actors, node, wait_for
from tests.support.labelled import every_row, lineage, settings
from tests.support.runs import named, quiet
from tests.support.training import train_here

GIVEN = (
    "input",
    "annotations",
    "recipe",
    "storage",
    "row_log",
    "epochs",
    "batch_size",
    "shard_rows",
    "max_reject_fraction",
    "holdout",
    "model",
    "model_arguments",
)


def command_of(given: Settings) -> list[str]:
    """jobs/train.py on CPUs with these settings, but without numbers of actors and workers."""
    flags = {f"--{name.replace('_', '-')}": str(given.flat[name]) for name in GIVEN}
    return [
        sys.executable,
        "jobs/train.py",
        "--cpu",
        *(word for flag in flags.items() for word in flag),
    ]


def mortal(labelled: Path, **given) -> tuple[Settings, Path]:
    """Settings of a training whose worker dies in step 4, once, and what marks that it has."""
    mark = labelled / "killed"
    return settings(
        labelled,
        holdout=0.0,
        model="tests.models.toy:mortal",
        model_arguments=json.dumps({"at": 4, "mark": str(mark)}),
        checkpoint_every=2,
        **given,
    ), mark


def has_weights_of_an_undisturbed_run(outcome: Outcome, given: Settings, folder: Path) -> None:
    undisturbed = train_here(given, folder)  # the mark is there: nobody dies
    disturbed = checkpoints.load(outcome.checkpoint)
    for name, tensor in undisturbed.state["model"].items():
        assert torch.equal(disturbed.state["model"][name], tensor), name
    losses = [
        [epoch["loss"] for epoch in where.progress.epochs] for where in (disturbed, undisturbed)
    ]
    assert losses[0][-1] == losses[1][-1]


@pytest.mark.slow
def test_a_killed_worker_leaves_the_weights_of_an_undisturbed_run(session, labelled):
    given, mark = mortal(labelled)
    console = quiet()
    outcome = run(given, console=console)
    assert mark.exists() and console.file.getvalue().count("retry 1 of 3") == 1
    assert verdict_on(outcome, given) is None
    assert Counter(lineage(labelled)) == every_row(given)
    assert outcome.report["train"]["attempts"] == 2
    has_weights_of_an_undisturbed_run(outcome, given, labelled / "undisturbed")


class TakesAway(io.StringIO):
    """A console that moves `photos` away when the run is listed and claimed, but has read none."""

    def __init__(self, photos: Path, away: Path):
        super().__init__()
        self._photos, self._away = photos, away

    def write(self, text: str) -> int:
        if "Watch it:" in text:
            self._photos.rename(self._away)
        return super().write(text)


@pytest.mark.soak
def test_images_away_a_killed_worker_and_two_executions_leave_the_weights_of_an_undisturbed_run(
    session, labelled, monkeypatch
):
    disturbed, mark = mortal(labelled, read_patience=1.0)
    photos = Path(disturbed.source.input)
    console = Console(file=TakesAway(photos, labelled / "away"), width=200)
    again = goes_on(resume=True)
    stopped = attempt(
        lambda: run(disturbed, console=console), kept="", again=again, console=console
    )
    assert stopped == 1
    said = console.file.getvalue()
    (failure,) = (line for line in said.splitlines() if line.startswith("error:"))
    assert "could not be read (" in failure and "The same command goes on from there." in said

    (labelled / "away").rename(photos)
    console = quiet()
    # As with an epoch of a million images: each gets an execution of its own.
    with monkeypatch.context() as patched:
        patched.setattr(epochs_module, "SEGMENT_ROWS", 45)
        outcome = run(disturbed, console=console)
    assert mark.exists()
    retries = console.file.getvalue().count("retry 1 of 3")
    assert said.count("retry 1 of 3") + retries == 1
    assert verdict_on(outcome, disturbed) is None
    assert Counter(lineage(labelled)) == every_row(disturbed)
    assert outcome.report["train"]["attempts"] == 2 + retries
    has_weights_of_an_undisturbed_run(outcome, disturbed, labelled / "undisturbed")


@pytest.mark.soak
def test_a_killed_driver_goes_on_with_the_same_command_and_other_numbers_of_workers_and_actors(
    labelled, bucket
):
    mark = labelled / "hangs"
    model = {
        "model": "tests.models.toy:mortal",
        "model_arguments": json.dumps({"at": 9, "mark": str(mark), "hang": True}),
    }
    given = settings(labelled, holdout=0.0, storage=bucket("storage"), **model)
    command = command_of(given)
    around = environment(PYTHONPATH=str(ROOT))  # for the model
    first = subprocess.Popen(
        [*command, "--workers", "1", "--actors", "1", "--checkpoint-every", "1"],
        cwd=ROOT,
        env=around,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(mark.exists, first)  # in the second epoch, after 8 steps
    finally:
        below = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=30)
    left = checkpoints.load(checkpoints.all_in(given.training.storage)[-1]).progress
    assert (left.epoch, left.step) == (1, 8)

    second = subprocess.run(
        [*command, "--workers", "2", "--actors", "1"],
        cwd=ROOT,
        env=around,  # a Ray of its own: the workers need the store's keys
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert second.returncode == 0, second.stderr
    assert f"{left.rows} of 90 rows are done, in 8 steps" in " ".join(second.stderr.split())
    assert Counter(lineage(labelled)) == every_row(given)
    assert "images in = " in second.stdout


@pytest.mark.soak
def test_a_training_goes_on_with_the_cpus_that_a_lost_node_leaves_and_no_row_is_missed(labelled):
    mark = labelled / "hangs"
    model = {
        "model": "tests.models.toy:mortal",
        "model_arguments": json.dumps({"at": 6, "mark": str(mark), "hang": True}),
    }
    # The held-out blocks are above 100 KiB. Ray keeps smaller objects in the driver, where no
    # lost node could take them away.
    given = settings(labelled, holdout=0.4, epochs=3, shard_rows=10, **model)
    around = environment(PYTHONPATH=str(ROOT), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
    around |= {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }  # a lost node is noticed sooner
    # The driver's node takes no work, as in cluster.yaml.
    with (
        head(cpus=0, env=around) as cluster,
        node(cluster, cpus=2, env=around) as first,
        node(cluster, cpus=2, env=around) as second,
    ):
        # All 4 CPUs. What is left then has room for the worker and one of the actors.
        command = [*command_of(given), "--workers", "1", "--actors", "3", "--checkpoint-every", "1"]
        driver = subprocess.Popen(
            command,
            cwd=ROOT,
            env=around | {"RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            wait_for(mark.exists, driver)  # in the second epoch
            # Ray Train's controller is on the driver's node. What the run needs must be there too.
            where = {
                actor["class_name"]: actor["node_id"] for actor in listed_actors(cluster, around)
            }
            assert where["Collector"] == where["Board"] == where["TrainController"]
            (lost,) = (one for one in (first, second) if has_worker(one))
            kill_all(lost)
            said, _ = driver.communicate(timeout=300)
        finally:
            kill_all(driver)
    assert driver.returncode == 0, said
    assert "A worker ended" in said and "retry 1 of 3" in " ".join(said.split())
    assert "Waiting for 2 of 4 CPUs" in " ".join(said.split())
    assert Counter(lineage(labelled)) == every_row(given)


def has_worker(node: subprocess.Popen) -> bool:
    """Whether a worker of Ray Train is on the node."""
    below = psutil.Process(node.pid).children(recursive=True)
    return any(named(process, "ray::RayTrainWorker") for process in below)


@pytest.mark.slow
def test_a_storage_that_a_node_does_not_see_is_refused_before_the_first_step(labelled, tmp_path):
    given = settings(labelled)
    storage = Path(given.training.storage)
    storage.mkdir()
    (storage / "mine.txt").write_text("the user's own")
    around = environment(PYTHONPATH=str(ROOT), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
    hidden = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs tmpfs {storage} && exec "$@"',
        "sh",
    ]
    if subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("only root can hide a folder from a process")
    with head(cpus=1, env=around) as cluster, node(cluster, cpus=2, env=around, before=hidden):
        env = around | {"RAY_ADDRESS": cluster.address}
        done = subprocess.run(
            command_of(given), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, done.stderr
    assert (
        f"--storage '{storage}' is a folder of this node, and 1 of the cluster's 2 nodes do not see"
        in said
    )
    assert [path.name for path in storage.rglob("*") if path.is_file()] == ["mine.txt"]
