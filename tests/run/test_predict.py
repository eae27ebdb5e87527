"""Predicting on a real Ray equals a plain PyTorch loop, and has the precision of the training."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from raypipe import UsageError
from raypipe.data import journal
from raypipe.data.location import Location
from raypipe.models import checkpoint as checkpoints
from raypipe.models import detection
from raypipe.models.checkpoint import Progress
from raypipe.run import probe
from raypipe.run.predict import Settings, predicting, run, start, verdict_on
from raypipe.run.result import Outcome
from tests.conftest import ROOT, files
from tests.support.clusters import wait_for
from tests.support.labelled import RECIPE, make_labelled
from tests.support.labelled import settings as training
from tests.support.runs import named, quiet, running, texts, until
from tests.support.training import train_here

pytestmark = pytest.mark.xdist_group(
    "trained"
)  # nearly all tests need that training: with `pytest -n` in one process

SIZE = (90, 120)


def settings(root: Path, output: Path, **given) -> Settings:
    defaults = {
        "checkpoint": root / "storage",
        "input": root / "photos",
        "output": output,
        "annotations": root / "boxes.json",
        "actors": 1,
        "predictors": 1,
        "batch_size": 4,
        "shard_rows": 10,
        "cpu": True,
        "max_reject_fraction": 0.05,
    }
    return Settings.of(**texts(defaults | given))


@dataclass(frozen=True)
class Trained:
    """A training that has ended, of the labelled photos in `root`, and judged on all of them."""

    root: Path
    checkpoint: str
    progress: Progress


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    root = make_labelled(tmp_path_factory.mktemp("trained"))
    judged = {"holdout_input": root / "photos", "holdout_annotations": root / "boxes.json"}
    given = training(root, epochs=11, lr=5e-3, shard_rows=15, row_log=None, **judged)
    kept = train_here(given, root / "storage/run-1")
    return Trained(root, checkpoints.find(str(root / "storage")), kept.progress)


@pytest.fixture(scope="module")
def done(session, trained, tmp_path_factory) -> tuple[Settings, Outcome]:
    """One run with everything: its counts are chosen by timing a few images beforehand."""
    wanted = settings(
        trained.root,
        tmp_path_factory.mktemp("done") / "out",
        draw=True,
        draw_score=0.2,
        actors="auto",
        predictors="auto",
        store_ms=40.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "WAIT_AT_MOST_S", 120.0)  # a slow machine is no defect
        return wanted, run(wanted, console=quiet())


def rows_of(output: str | Path) -> dict[str, dict]:
    """The predictions, by image id."""
    return {
        row["image_id"]: row
        for part in sorted(Path(output, "predictions").iterdir())
        for row in pq.read_table(part).to_pylist()
    }


def plain_loop(root: Path, checkpoint: str) -> Iterator[tuple[str, dict]]:
    """The same without raypipe's stages, as the documentation of PyTorch and OpenCV does it."""
    model = detection.build("ssd_tiny", num_classes=3)
    model.load_state_dict(torch.load(Path(checkpoint, "state.pt"), weights_only=True)["model"])
    model.eval()
    mean, std = (torch.tensor(RECIPE["finish"][name])[:, None, None] for name in ("mean", "std"))
    for number in range(45):
        image = cv2.imread(str(root / f"photos/{number:03d}.jpg"))
        if number == 7:  # OpenCV would fill up what is missing with grey
            continue
        image = cv2.resize(
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (64, 64), interpolation=cv2.INTER_LINEAR
        )
        pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            found = model([pixels])[0]
        scale = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]]) / 64
        yield (
            str(number + 1),
            {"boxes": found["boxes"] * scale, "labels": found["labels"], "scores": found["scores"]},
        )


def test_predictions_equal_those_of_a_plain_pytorch_loop(trained, done):
    root = trained.root
    ours = rows_of(done[0].predicting.output)
    theirs = dict(plain_loop(root, trained.checkpoint))
    assert list(ours) == list(theirs) and len(theirs) == 44
    assert sum(len(row["scores"]) for row in ours.values()) > 100
    for image_id, found in theirs.items():
        row = ours[image_id]
        assert (row["height"], row["width"]) == SIZE
        assert [{3: 1, 90: 2}[label] for label in row["labels"]] == found["labels"].tolist()
        # The plain loop has batches of 1 instead of 4, and rounds the input once less.
        np.testing.assert_allclose(row["scores"], found["scores"], atol=1e-5)
        np.testing.assert_allclose(np.array(row["boxes"]).reshape(-1, 4), found["boxes"], atol=1e-3)


def test_coco_results_have_the_annotations_ids_and_the_precision_that_training_had(
    trained, done, tmp_path
):
    root = trained.root
    wanted, outcome = done
    results = json.loads(Path(wanted.predicting.output, "predictions.json").read_text())
    stored = rows_of(wanted.predicting.output)
    assert Counter(one["image_id"] for one in results) == {
        int(i): len(row["boxes"]) for i, row in stored.items() if row["boxes"]
    }
    first = next(one for one in results if one["image_id"] == 3)
    x1, y1, x2, y2 = stored["3"]["boxes"][0]
    assert first["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
    assert (first["category_id"], first["score"]) == (
        stored["3"]["labels"][0],
        pytest.approx(stored["3"]["scores"][0]),
    )

    last = trained.progress.epochs[-1]
    found = outcome.report["predict"]
    assert last["map"] > 0.05  # else the comparison would say nothing
    assert (found["map"], found["map50"]) == (
        pytest.approx(last["map"], abs=1e-6),
        pytest.approx(last["map50"], abs=1e-6),
    )
    assert found["map_by_label"].keys() == {"red", "blue"}
    assert (found["boxes"], found["checkpoint"]["step"]) == (
        len(results),
        trained.progress.step,
    )

    # COCO's own reader and judge take the files as they are.
    from faster_coco_eval import COCO, COCOeval_faster

    known = json.loads((root / "boxes.json").read_text())
    known["annotations"] = [one for one in known["annotations"] if one["bbox"][2]]  # with an area
    (tmp_path / "boxes.json").write_text(json.dumps(known))
    truth = COCO(str(tmp_path / "boxes.json"), print_function=lambda *_: None)
    judge = COCOeval_faster(
        truth,
        truth.loadRes(str(Path(wanted.predicting.output, "predictions.json"))),
        iouType="bbox",
        print_function=lambda *_: None,
    )
    judge.params.imgIds = [int(image_id) for image_id in stored]
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    assert float(precision[precision > -1].mean()) == pytest.approx(found["map"], abs=1e-4)


def test_the_report_has_the_stage_and_every_image_is_accounted_for(done):
    wanted, outcome = done
    assert verdict_on(outcome, wanted) is None
    report = outcome.report
    assert (report["images_in"], report["images_out"], report["images_rejected"]) == (45, 44, 1)
    assert [(row.image_id, row.uri) for row in outcome.rejected] == [
        ("8", str(Path(wanted.source.input, "007.jpg")))
    ]
    assert "more than --max-reject-fraction 0.01" in verdict_on(
        outcome, wanted.changed(max_reject_fraction=0.01)
    )
    preprocess, predict = report["stages"]
    assert (preprocess["name"], predict["name"]) == ("preprocess", "predict")
    assert preprocess["images"] == predict["images"] == 45
    assert predict["gpu_percent"] is None and predict["gpu_memory_peak_bytes"] is None
    assert (
        predict["cpu_s_per_image"] > 0
        and predict["rss_peak_bytes"] > 10**8
        and predict["bytes_out"] > 0
    )
    assert predict["busy"] + predict["starved"] + predict["blocked"] == pytest.approx(1)
    assert report["settings"]["checkpoint"] == wanted.model.checkpoint
    # None: something outside the stages limits, as on a machine that other programs use.
    assert report["verdict"]["stage"] in ("preprocess", "predict", None)
    state = Path(wanted.predicting.output, "_raypipe")
    assert json.loads((state / "report.json").read_text())["predict"] == report["predict"]
    assert "predict" in (state / "report.html").read_text()
    assert pq.read_table(state / "rejects.parquet").num_rows == 1


def test_boxes_are_drawn_on_the_images_under_their_own_names(done):
    wanted, _ = done
    drawn = sorted(Path(wanted.predicting.output, "drawn").iterdir())
    assert [path.name for path in drawn] == [
        f"{number:03d}.jpg" for number in range(45) if number != 7
    ]
    stored = rows_of(wanted.predicting.output)
    sure = {path.name: stored[str(int(path.stem) + 1)] for path in drawn}
    for path in drawn:
        before, after = cv2.imread(str(Path(wanted.source.input, path.name))), cv2.imread(str(path))
        assert before.shape == after.shape == (*SIZE, 3)
        moved = np.abs(before.astype(int) - after).max() > 60
        assert moved == any(score >= 0.2 for score in sure[path.name]["scores"])


def test_running_again_does_nothing_but_what_is_missing(done):
    wanted, _ = done
    before = {
        path: path.stat().st_mtime_ns
        for path in Path(wanted.predicting.output).rglob("*")
        if path.is_file()
    }
    results = Path(wanted.predicting.output, "predictions.json")
    content = results.read_bytes()
    console = quiet()
    assert run(wanted, console=console).report is None
    assert "Nothing to do: all 45 images" in console.file.getvalue()
    assert {
        path: path.stat().st_mtime_ns
        for path in Path(wanted.predicting.output).rglob("*")
        if path.is_file()
    } == before
    results.unlink()  # as if the run had been killed when its last shard was done
    assert run(wanted, console=quiet()).report is None
    assert results.read_bytes() == content


def test_other_settings_are_refused_with_the_difference(trained, done, tmp_path):
    wanted, _ = done
    kept = checkpoints.load(trained.checkpoint)
    kept.state["model"]["backbone.stem.0.0.weight"] += 1e-3
    other = str(tmp_path / "storage/x" / checkpoints.name_of(kept.progress))
    checkpoints.save(other, kept)
    for given, words in (
        ({"min_score": 0.3}, "min_score: 0.0 there, 0.3 now"),
        ({"checkpoint": other}, "checkpoint.digest: '"),
        ({"draw": False}, "draw: 0.2 there, None now"),
        ({"input": str(tmp_path)}, "input: "),
    ):
        with pytest.raises(UsageError, match="made with other settings") as caught:
            predicting(wanted.changed(**given))
        assert words in str(caught.value)


def test_a_file_that_is_no_result_is_never_overwritten(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.json").write_text("the user's own")
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"predictions\.json exists and is no result"):
            predicting(settings(trained.root, tmp_path / "out", resume=resume))


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_the_results_are_those_of_an_undisturbed_run(
    trained, done, joined, tmp_path
):
    names = (
        "checkpoint",
        "input",
        "annotations",
        "actors",
        "predictors",
        "batch_size",
        "shard_rows",
        "max_reject_fraction",
        "draw_score",
    )
    wanted = done[0].changed(output=str(tmp_path / "out"), actors=1, predictors=1)
    flags = {f"--{name.replace('_', '-')}": str(wanted.flat[name]) for name in (*names, "output")}
    command = [
        sys.executable,
        "jobs/predict.py",
        "--cpu",
        "--draw",
        *(word for flag in flags.items() for word in flag),
    ]
    first = subprocess.Popen(
        [*command, "--store-ms", "60"],
        cwd=ROOT,
        env=joined,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list((tmp_path / "out").glob("_raypipe/journal/*.json"))) >= 2, first)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)  # of the Ray that it joined
        if named(child, "ray::MapWor")
    ]
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=300)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert workers and not alive
    left = 45 - 10 * len(list((tmp_path / "out").glob("_raypipe/journal/*.json")))
    assert 0 < left < 45 and not (tmp_path / "out/predictions.json").exists()

    again = subprocess.run(
        command, cwd=ROOT, env=joined, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert f"Going on: {45 - left} of 45 images are done already" in again.stderr
    assert "mAP 0." in again.stdout and "predict" in again.stdout
    assert files(tmp_path / "out") == files(Path(done[0].predicting.output))


@pytest.mark.soak
def test_the_stage_scales_by_its_name(session, trained, tmp_path):
    # The work lasts far longer than an actor takes to start. The test does not wait for its end.
    given = {"input": "demo:600", "annotations": None, "shard_rows": 2, "store_ms": 400.0}
    wanted = settings(trained.root, tmp_path / "out", **given)
    going = start(wanted, console=quiet())
    until(going, lambda record: record["done"] > 0, at_most_s=240)
    assert going.scale(predict=2, preprocess=2) == {"preprocess": 2, "predict": 2}
    record = until(going, lambda record: running(record)["predict"] == (2, 0, 0), at_most_s=240)
    assert [(event["stage"], event["to"]) for event in record["scale_events"]] == [
        ("predict", 2),
        ("preprocess", 2),
    ]
    with pytest.raises(UsageError, match="its stages are preprocess, predict"):
        going.scale(write=2)
    going.stop()
    with pytest.raises(KeyboardInterrupt):
        going.wait()
    output = Location.of(wanted.predicting.output)
    entries = journal.read_entries(output, sorted(journal.done_shards(output)))
    count = Counter(row.image_id for entry in entries for row in entry.written)
    assert count and set(count.values()) == {1} == {
        len(entry.files) for entry in journal.read_entries(output, [0])
    }


def test_no_resume_starts_again_and_annotations_are_not_needed(done, trained, tmp_path):
    """Into an output that has more results, of other settings."""
    shutil.copytree(done[0].predicting.output, tmp_path / "out")
    again = settings(
        trained.root,
        tmp_path / "out",
        annotations=None,
        limit=6,
        min_score=0.05,
        checkpoint=trained.checkpoint,
        resume=False,
    )
    report = run(again, console=quiet()).report
    assert (report["images_in"], report["images_out"], report["images_done_before"]) == (6, 6, 0)
    assert (report["predict"]["map"], report["predict"]["map_by_label"]) == (None, None)
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    # Without annotations, ids are the images' own.
    assert results and {one["image_id"] for one in results} <= {
        f"{number:03d}.jpg" for number in range(6)
    }
    assert min(one["score"] for one in results) >= 0.05
    assert len(rows_of(tmp_path / "out")) == 6


def test_auto_times_the_model_before_the_start(done):
    wanted, outcome = done
    predicted = outcome.report["predicted"]
    assert predicted["images_per_s"] > 0 and predicted["actors"].keys() == {"preprocess", "predict"}
    # 45 images of 40 ms of waiting and hardly any computing.
    assert predicted["actors"]["preprocess"] == 1
    # What the timing stored is gone.
    assert not list(Path(wanted.predicting.output, "_raypipe").glob("tmp/*"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"checkpoint": "nowhere"}, "There is no checkpoint in"),
        ({"checkpoint": "README.md"}, "There is no checkpoint in"),
        ({"predictors": 0}, "--predictors is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"min_score": 1.5}, "--min-score is 1.5; scores go from 0 to 1"),
        ({"gpu": True}, "--gpu and --cpu"),
        ({"actors": 0}, "--actors is 0"),
        ({"annotations": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_bad_settings_are_refused_with_the_value_and_the_remedy(trained, tmp_path, given, words):
    with pytest.raises(UsageError) as caught:
        run(settings(trained.root, tmp_path / "out", **given), console=quiet())
    assert words in str(caught.value)


def test_an_op_of_the_recipe_that_is_not_there_is_named(trained, tmp_path):
    kept = checkpoints.load(trained.checkpoint)
    kept.settings["recipe"]["ops"].append({"op": "gone_module:Sparkle"})
    folder = str(tmp_path / "storage/x" / checkpoints.name_of(kept.progress))
    checkpoints.save(folder, kept)
    with pytest.raises(
        UsageError, match=r"The recipe in the checkpoint .* cannot be used.*gone_module:Sparkle"
    ):
        predicting(
            settings(
                trained.root, tmp_path / "out", checkpoint=folder, trust=("gone_module:Sparkle",)
            )
        )
    with pytest.raises(UsageError, match=r"add --trust gone_module:Sparkle$"):
        predicting(settings(trained.root, tmp_path / "out", checkpoint=folder))
