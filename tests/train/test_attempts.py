"""Training on a real local Ray: every row once an epoch, scaled and judged as it should be."""

import contextlib
import json
import threading
import time
from collections import Counter

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from raypipe import UsageError
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.run.causes import cause_of
from raypipe.run.live.control import attach, names
from raypipe.run.preprocess import Settings as Preprocess
from raypipe.train.attempts import _give_up, run
from raypipe.train.plan import plan
from raypipe.train.result import Outcome, verdict_on
from tests.conftest import jpeg
from tests.support.labelled import RECIPE, every_row, lineage, settings
from tests.support.runs import plain_loop, quiet
from tests.support.training import train_here


@pytest.mark.slow
def test_a_run_trains_on_every_row_once_an_epoch_and_reports_what_it_cost(session, labelled):
    """45 is odd, so the 2 workers get different numbers of rows."""
    judged = {
        "holdout_input": labelled / "photos",
        "holdout_annotations": labelled / "boxes.json",
    }
    given = settings(labelled, workers=2, epochs=2, shard_rows=15, **judged)
    console = quiet()
    outcome = run(given, console=console)
    assert verdict_on(outcome, given) is None
    assert Counter(lineage(labelled)) == every_row(given)
    assert set(every_row(given).values()) == {1}

    report = outcome.report
    assert report["images_in"] == 90 == report["images_out"] + report["images_rejected"]
    assert (report["images_rejected"], report["train"]["holdout_rejected"]) == (
        2,
        1,
    )  # photo 7, in each epoch and held out
    # Each of 5 photos is both trained on and judged on.
    assert (report["boxes_dropped"], report["images_damaged_kept"]) == (5 + 5, 0)
    preprocess, train = report["stages"]
    assert (preprocess["name"], train["name"]) == ("preprocess", "train")
    assert preprocess["images"] == train["images"] == 90
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
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    assert all(
        0 <= epoch["map"] <= 1 and epoch["loss"] > 0 and epoch["images_per_s"] > 0
        for epoch in epochs
    )
    assert set(epochs[0]["map_by_label"]) == {"3", "90"}
    stored = json.loads((labelled / "storage/_raypipe/report.json").read_text())
    assert stored["train"]["map"] == epochs[-1]["map"]
    assert "<svg" in (labelled / "storage/_raypipe/report.html").read_text()

    kept = checkpoints.load(outcome.checkpoint)
    assert kept.settings["classes"] == [3, 90]
    assert kept.settings["recipe"]["name"] == "small"
    assert kept.progress == outcome.progress
    assert "epoch 1 done: loss" in console.file.getvalue()

    console = quiet()
    again = run(given, console=console)
    assert again.report is None and again.checkpoint == outcome.checkpoint
    assert "Nothing to do: all 2 epochs are done" in console.file.getvalue()


@pytest.mark.slow
def test_preprocess_is_scaled_while_a_model_trains_across_epochs(session, labelled):
    given = settings(
        labelled,
        model="tests.models.toy:Toy",
        epochs=6,
        read_ms=100.0,
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
        assert 0 < at[0] <= at[1] < record["images"] == 270
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
