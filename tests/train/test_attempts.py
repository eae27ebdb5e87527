"""Training on a real local Ray: every row once an epoch, whoever dies; and as a user runs it."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from rich.console import Console

from raypipe import UsageError
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.run.causes import cause_of
from raypipe.run.console import attempt, goes_on
from raypipe.run.live.control import attach, names
from raypipe.run.preprocess import Settings as Preprocess
from raypipe.train import epochs as epochs_module
from raypipe.train.attempts import _give_up, run
from raypipe.train.plan import plan
from raypipe.train.result import Outcome, verdict_on
from raypipe.train.settings import Settings
from tests.conftest import ROOT, jpeg
from tests.support.clusters import environment, head, kill_all, listed_actors, node, wait_for
from tests.support.labelled import RECIPE, make_labelled, settings
from tests.support.runs import named, plain_loop, quiet
from tests.support.training import train_here


@pytest.fixture
def labelled(tmp_path) -> Path:
    return make_labelled(tmp_path)


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


def lineage(root: Path) -> list[str]:
    """The rows that the final weights were trained on, as epoch/image, from the row log.

    Of each attempt it has the steps before the first one of the next attempt.
    """
    attempts: dict[str, dict[int, list[str]]] = {}
    for path in sorted((root / "log").iterdir(), key=lambda path: path.stat().st_ctime_ns):
        steps = attempts.setdefault(path.stem.rpartition("-")[0], {})
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(
                f"{record['epoch']}/{i}" for i in record["image_ids"]
            )
    rows: list[str] = []
    begun = [steps for steps in attempts.values() if steps]  # others ended before their first step
    firsts = [min(steps) for steps in begun]
    for steps, first_of_next in zip(begun, [*firsts[1:], 10**9], strict=True):
        rows += [row for step, those in steps.items() if step < first_of_next for row in those]
    return rows


def every_row(given: Settings) -> Counter[str]:
    epochs = plan(given).epochs
    ids = epochs.source["image_id"].to_pylist()
    return Counter(f"{epoch}/{image_id}" for epoch in range(epochs.epochs) for image_id in ids)


@pytest.mark.xdist_group("trained")
def test_a_run_trains_on_every_row_once_an_epoch_and_reports_what_it_cost(trained):
    given, outcome = trained.settings, trained.outcome
    assert verdict_on(outcome, given) is None
    assert Counter(lineage(trained.root)) == every_row(given)
    assert set(every_row(given).values()) == {1}

    report = outcome.report
    assert report["images_in"] == 495 == report["images_out"] + report["images_rejected"]
    assert (report["images_rejected"], report["train"]["holdout_rejected"]) == (
        11,
        1,
    )  # photo 7, in each epoch and held out
    # Each of 5 photos is both trained on and judged on.
    assert (report["boxes_dropped"], report["images_damaged_kept"]) == (5 + 5, 0)
    preprocess, train = report["stages"]
    assert (preprocess["name"], train["name"]) == ("preprocess", "train")
    assert preprocess["images"] == train["images"] == 495
    assert (
        train["actors"]["max"] == 2
        and train["gpu_percent"] is None
        and train["gpu_memory_peak_bytes"] is None
    )
    assert train["cpu_s_per_image"] > 0 and train["rss_peak_bytes"] > 10**8
    assert train["busy"] + train["starved"] + train["blocked"] == pytest.approx(1)
    assert 0 < report["train"]["accelerator_utilisation"] < 1
    assert len(report["train"]["workers"]) == 2
    epochs = report["train"]["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == list(range(11))
    assert all(
        0 <= epoch["map"] <= 1 and epoch["loss"] > 0 and epoch["images_per_s"] > 0
        for epoch in epochs
    )
    assert set(epochs[0]["map_by_label"]) == {"3", "90"}
    stored = json.loads((trained.root / "storage/_raypipe/report.json").read_text())
    assert stored["train"]["map"] == epochs[-1]["map"]
    assert "<svg" in (trained.root / "storage/_raypipe/report.html").read_text()

    kept = checkpoints.load(outcome.checkpoint)
    assert kept.settings["classes"] == [3, 90]
    assert kept.settings["recipe"]["name"] == "small"
    assert kept.progress == outcome.progress
    assert "epoch 1 done: loss" in trained.said

    console = quiet()
    again = run(given, console=console)
    assert again.report is None and again.checkpoint == outcome.checkpoint
    assert "Nothing to do: all 11 epochs are done" in console.file.getvalue()


@pytest.mark.slow
def test_preprocess_is_scaled_while_a_model_trains_across_epochs(session, labelled):
    given = settings(
        labelled,
        model="tests.models.toy:Toy",
        epochs=20,
        read_ms=20.0,
        actors=1,
        holdout=0.0,
        run_id="scaled",
    )
    ended: list[Outcome] = []
    thread = threading.Thread(target=lambda: ended.append(run(given, console=quiet())))
    thread.start()
    try:
        for _ in range(600):
            time.sleep(0.2)
            # Where actors start slowly, a collector that has its name already does not answer yet.
            with contextlib.suppress(UsageError):
                if "scaled" in names() and any(
                    s["name"] == "train" and s["images"] for s in attach("scaled").live()["stages"]
                ):
                    break
        control = attach("scaled")
        with pytest.raises(
            UsageError,
            match="what can be scaled is preprocess",
        ):
            control.scale({"train": 2})
        at = []
        for count in (4, 2):
            control.scale({"preprocess": count})
            for _ in range(300):
                record = control.live()
                (preprocess,) = (
                    stage for stage in record["stages"] if stage["name"] == "preprocess"
                )
                if (preprocess["actors"], preprocess["pending"], preprocess["draining"]) == (
                    count,
                    0,
                    0,
                ):
                    break
                time.sleep(0.1)
            at.append(record["done"])
        assert 0 < at[0] <= at[1] < record["images"] == 900
    finally:
        thread.join(120)
    (outcome,) = ended
    assert verdict_on(outcome, given) is None
    assert Counter(lineage(labelled)) == every_row(given)
    assert [
        (event["stage"], event["from"], event["to"]) for event in outcome.report["scale_events"]
    ] == [
        ("preprocess", 1, 4),
        ("preprocess", 4, 2),
    ]
    assert outcome.report["stages"][0]["actors"]["max"] == 4


@pytest.mark.slow
def test_a_training_from_stored_images_ends_with_the_weights_of_one_from_the_source(
    session, labelled
):
    (labelled / "photos/007.jpg").write_bytes(jpeg(7, height=90, width=120))
    (labelled / "small.json").write_text(json.dumps(RECIPE | {"ops": RECIPE["ops"][1:]}))
    continuous = settings(labelled, holdout=0.2, row_log=None)
    written = Preprocess.of(
        input=continuous.source.input,
        annotations=continuous.source.annotations,
        recipe=continuous.learning.recipe,
        format="parquet",
    )
    plain_loop(written, labelled / "stored")
    separate = continuous.changed(input=str(labelled / "stored"), annotations=None)
    one, other = (
        run(continuous, console=quiet()),
        train_here(separate, labelled / "separate"),
    )
    weights, same = checkpoints.load(one.checkpoint).state["model"], other.state["model"]
    for name, tensor in weights.items():
        assert torch.equal(tensor, same[name]), name
    assert one.report["train"]["map"] == other.progress.epochs[-1]["map"]
    said = one.report["train"]["break_even"]
    assert said["once_s"] > 0 and said["continuous_s"] > 0 and said["stored_s"] > 0
    assert (said["epochs"] is None) == ("saves no time" in said["reason"])


class TakesAway(io.StringIO):
    """A console that moves `photos` away when the run is listed and claimed, but has read none."""

    def __init__(self, photos: Path, away: Path):
        super().__init__()
        self._photos, self._away = photos, away

    def write(self, text: str) -> int:
        if "Watch it:" in text:
            self._photos.rename(self._away)
        return super().write(text)


@pytest.mark.slow
def test_images_away_a_killed_worker_and_two_executions_leave_the_weights_of_an_undisturbed_run(
    session, labelled, monkeypatch
):
    mark = labelled / "killed"
    own = {
        "model": "tests.models.toy:mortal",
        "model_arguments": json.dumps({"at": 4, "mark": str(mark)}),
        "checkpoint_every": 2,
    }
    disturbed = settings(labelled, holdout=0.0, read_patience=1.0, **own)
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

    undisturbed = train_here(disturbed, labelled / "undisturbed")  # the mark is there: nobody dies
    disturbed_ended = checkpoints.load(outcome.checkpoint)
    for name, tensor in undisturbed.state["model"].items():
        assert torch.equal(disturbed_ended.state["model"][name], tensor), name
    losses = [
        [epoch["loss"] for epoch in where.progress.epochs]
        for where in (disturbed_ended, undisturbed)
    ]
    assert losses[0][-1] == losses[1][-1]


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


def test_a_checkpoint_of_another_model_or_recipe_is_refused_with_the_difference(labelled):
    given = settings(labelled)
    folder = labelled / "storage/earlier" / checkpoints.name_of(Progress(step=4))
    state = {"model": {}, "optimizer": {}, "random": []}
    checkpoints.save(
        str(folder),
        Checkpoint(settings=plan(given).deciding, progress=Progress(step=4), seen={}, state=state),
    )
    (labelled / "small.json").write_text(json.dumps(RECIPE | {"ops": RECIPE["ops"][1:]}))
    with pytest.raises(UsageError) as caught:
        run(given.changed(model="ssdlite320_mobilenet_v3_large", lr=0.5), console=quiet())
    said = str(caught.value)
    assert "model.name: 'ssd_tiny' there, 'ssdlite320_mobilenet_v3_large' now" in said
    assert "lr: 0.001 there, 0.5 now" in said
    assert "recipe.ops.0.op: 'HorizontalFlip' there, 'Resize' now" in said
    assert "--no-resume" in said
    assert folder.exists()


def test_deaths_are_retried_as_often_as_allowed_but_not_what_the_code_itself_raises_twice():
    died = WorkerGroupError("rank 0", {0: ActorDiedError()})
    _give_up(died, 1, 2, before=None)
    _give_up(died, 2, 2, before=cause_of(died))
    with pytest.raises(WorkerGroupError):
        _give_up(died, 3, 2, before=cause_of(died))
    defect = WorkerGroupError("rank 0", {0: ValueError("a defect of the model's own")})
    _give_up(defect, 1, 2, before=None)
    with pytest.raises(WorkerGroupError, match="rank 0"):
        _give_up(defect, 2, 2, before=cause_of(defect))
    with pytest.raises(UsageError, match="Lower --lr"):
        _give_up(WorkerGroupError("rank 1", {1: UsageError("Lower --lr")}), 1, 2, before=None)


def test_what_the_listing_of_the_images_to_judge_on_leaves_out_is_counted(labelled, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "x.jpg").write_bytes((labelled / "photos/000.jpg").read_bytes())
    (held / "notes.txt").touch()
    before = plan(settings(labelled)).skipped
    found = plan(settings(labelled, holdout_input=held))
    assert found.holdout.num_rows == 1
    assert found.skipped == Counter(before) + Counter({".txt": 1})


def test_the_hold_out_is_a_function_of_the_seed_and_is_never_trained_on(labelled):
    first, again, other = (plan(settings(labelled, holdout=0.2, seed=seed)) for seed in (1, 1, 2))
    held = set(first.holdout["image_id"].to_pylist())
    assert len(held) == 9
    assert (
        held
        == set(again.holdout["image_id"].to_pylist())
        != set(other.holdout["image_id"].to_pylist())
    )
    assert not held & set(first.epochs.source["image_id"].to_pylist())
    assert first.epochs.total == 2 * 36


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"holdout": 1.0}, "--holdout is 1.0"),
        ({"gpu": True}, "--gpu and --cpu"),
        ({"workers": 9}, "--batch-size is 8 for 9 workers"),
        ({"model_arguments": "[1]"}, "must be an object"),
        ({"model": "ssd300_vgg16"}, "exactly 300x300"),
        ({"annotations": None}, "has labelled boxes"),
        ({"holdout_annotations": "x.json"}, "Give --holdout-input"),
    ],
)
def test_bad_settings_are_refused_with_the_value_and_the_remedy(labelled, given, words):
    with pytest.raises(UsageError) as caught:
        run(settings(labelled, **given), console=quiet())
    assert words in str(caught.value)
