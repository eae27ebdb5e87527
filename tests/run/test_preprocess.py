import contextlib
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data import journal, outputs
from raypipe.data.location import Location
from raypipe.data.sinks import FORMATS
from raypipe.data.work import shards
from raypipe.images import catalog
from raypipe.images.ops.geometry import Resize
from raypipe.images.recipe import Recipe
from raypipe.run.dataset import dataset_of
from raypipe.run.preprocess import Settings, image_folder, plan, preprocessing, run, verdict_on
from raypipe.stages.preprocess import pixels
from tests.conftest import files, jpeg, make_photos
from tests.support.runs import plain_loop, quiet, settings


# Each format and each backend once: neither several actors nor who writes depend on the format. For
# the encoders of each backend see tests/images/test_backends.py.
@pytest.mark.parametrize(
    ("backend", "format", "actors", "writers"),
    [
        pytest.param("opencv", "jpeg", 2, 2, marks=pytest.mark.smoke),
        *(("opencv", format, 1, 0) for format in FORMATS if format != "jpeg"),
        ("torchvision", "jpeg", 1, 0),
    ],
)
def test_distributed_output_equals_a_plain_loop_byte_for_byte(
    session, photos, tmp_path, backend, format, actors, writers
):
    recipe = "coco-300-pt" if format == "npy" else "coco-300"
    wanted = settings(
        input=photos,
        output=tmp_path / "out",
        backend=backend,
        format=format,
        recipe=recipe,
        actors=actors,
        writers=writers,
    )
    outcome = run(wanted, console=quiet())
    assert verdict_on(outcome, wanted) is None
    stages = {stage["name"]: stage for stage in outcome.report["stages"]}
    assert list(stages) == (["preprocess", "write"] if writers else ["preprocess+write"])
    steps = [step for stage in stages.values() for step in stage["steps"]]
    assert [step["name"] for step in steps] == ["preprocess", "write"]
    assert all(step["busy_s_per_image"] > 0 for step in steps)
    form, other = ("separate", "fused") if writers else ("fused", "separate")
    said = outcome.report["writing"]
    assert (said["form"], said["other"]["form"]) == (form, other)
    plain_loop(wanted, tmp_path / "plain")
    want = files(tmp_path / "plain")
    assert len(want) == (60 if format in ("jpeg", "png", "npy") else 9)
    assert files(tmp_path / "out") == want


def test_random_augmentations_do_not_depend_on_who_does_them(session, tmp_path):
    inputs = settings(input="demo:24", recipe="ssd-300-train", format="parquet", seed=5)
    run(inputs.changed(output=str(tmp_path / "three"), actors=3, shard_rows=4), console=quiet())
    for name, seed in (("one", 5), ("other", 6)):
        plain_loop(inputs.changed(seed=seed, shard_rows=4), tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert files(tmp_path / "one") != files(tmp_path / "other")


def test_without_output_every_block_reaches_the_consumer_and_nothing_is_written(
    session, photos, tmp_path
):
    seen = []
    report = run(
        settings(input=photos),
        consume=lambda block: seen.append(pixels(block).shape),
        console=quiet(),
    ).report
    assert sum(shape[0] for shape in seen) == 60
    assert {shape[1:] for shape in seen} == {(300, 300, 3)}
    assert [stage["name"] for stage in report["stages"]] == ["preprocess", "consume"]
    assert report["stages"][1]["images"] == 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_a_consumer_that_takes_long_is_a_stage_of_its_own(session, photos):
    """Whether it limits is tested with planted measurements: tests/insight/test_verdict.py."""

    def slowly(block: pa.Table) -> None:
        time.sleep(0.2)

    report = run(settings(input=photos), consume=slowly, console=quiet()).report
    consume = report["stages"][1]
    assert (consume["name"], consume["images"], consume["blocked"]) == ("consume", 60, 0)
    assert consume["busy_s_per_image"] * 60 >= 9 * 0.2  # 9 blocks


@pytest.fixture(scope="module")
def made(session, tmp_path_factory) -> Path:
    """A folder with 60 photos and a finished output of them; only to be copied."""
    root = tmp_path_factory.mktemp("made")
    make_photos(root / "photos")
    run(settings(input=root / "photos", output=root / "out"), console=quiet())
    return root


@pytest.fixture
def finished(made, tmp_path) -> Settings:
    """The settings of a finished run, whose output is the test's own."""
    shutil.copytree(made / "out", tmp_path / "out")
    return settings(input=made / "photos", output=tmp_path / "out")


@pytest.mark.xdist_group("finished")
def test_running_again_does_nothing_and_says_so(finished, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.jpg")}
    console = quiet()
    outcome = run(finished, console=console)
    assert outcome.report is None
    assert "Nothing to do: all 60 images" in console.file.getvalue()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.jpg")} == before


@pytest.mark.xdist_group("finished")
def test_images_added_later_are_all_that_a_second_run_does(made, finished, tmp_path):
    late = made / "photos/a/late.jpg"
    late.write_bytes(jpeg(99))
    try:
        report = run(finished, console=quiet()).report
        plain_loop(finished, tmp_path / "plain")
    finally:
        late.unlink()
    assert (report["images_in"], report["images_out"], report["images_done_before"]) == (61, 61, 60)
    assert report["stages"][0]["images"] == 1
    assert files(tmp_path / "out") == files(tmp_path / "plain")


@pytest.mark.xdist_group("finished")
def test_other_settings_into_the_same_output_are_refused_and_no_resume_starts_again(
    finished, tmp_path
):
    with pytest.raises(UsageError, match=r"format: 'jpeg' there, 'png' now"):
        run(finished.changed(format="png"), console=quiet())
    assert len(files(tmp_path / "out")) == 60
    run(finished.changed(format="png", resume=False), console=quiet())
    assert {Path(name).suffix for name in files(tmp_path / "out")} == {".png"}


def claimed(wanted: Settings) -> pa.Table:
    """What is left to do, in an output that a run has claimed."""
    todo = plan(wanted)
    with outputs.claimed(todo.claim, run_id="test"):
        return todo.left


def pretend_done(root: Path, shard: pa.Table) -> None:
    """What the journal has of a shard that a writer is done with."""
    rows = shard.to_pylist()
    written = [
        journal.Written(image_id=row["image_id"], file=row["name"] + ".jpg", height=300, width=300)
        for row in rows
    ]
    number = rows[0]["shard"]
    journal.put_entry(
        Location.of(str(root)),
        journal.Entry(
            epoch=0,
            shard=number,
            written=written,
            rejected=[],
            files=[w.file for w in written],
            bytes=1,
        ),
    )


def test_images_that_are_missing_for_one_run_are_done_when_they_are_back(photos, tmp_path):
    wanted = settings(input=photos, output=tmp_path / "out")  # 60 images, 7 a shard
    *most, last = shards(claimed(wanted))
    for shard in most:
        pretend_done(tmp_path / "out", shard)
    (less,) = shards(claimed(wanted.changed(limit=58)))
    assert last.num_rows == 4 and less.num_rows == 2
    pretend_done(tmp_path / "out", less)
    left = claimed(wanted)
    assert set(left.column("image_id").to_pylist()) == set(
        last.column("image_id").to_pylist()
    ) - set(less.column("image_id").to_pylist())
    for shard in shards(left):
        pretend_done(tmp_path / "out", shard)
    assert plan(wanted).left.num_rows == 0


def test_a_journal_that_has_lost_images_is_not_taken_for_done(photos, tmp_path):
    wanted = settings(input=photos, output=tmp_path / "out")
    for shard in shards(claimed(wanted)):
        pretend_done(
            tmp_path / "out", shard.slice(1) if shard.column("shard")[0].as_py() == 3 else shard
        )
    with pytest.raises(
        UsageError, match="its entries have 1 of 60 images neither as written nor as rejected"
    ):
        run(wanted, console=quiet())


def test_a_stage_on_gpus_can_be_built_on_a_machine_without(session, photos, tmp_path):
    job = preprocessing(settings(input=photos, output=tmp_path / "out", writers=1))
    first, then = job.stages("never-run")
    stages = (first, replace(then, gpu=True))
    dataset_of(job.todo.work, stages, {"preprocess": 1, "write": 1})  # raises nothing


def kill_workers(titles: list[str], stop: threading.Event, killed: list[int]) -> None:
    """SIGKILL a process of this Ray with each title in its command line, in turn, 0.7 s apart."""
    while len(killed) < len(titles) and not stop.wait(0.7):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = titles[len(killed)]
                if title in " ".join(process.cmdline()) and process.pid not in killed:
                    process.kill()
                    killed.append(process.pid)
                    break


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages", [["Preprocess", "Write", "Write", "Preprocess"], ["PreprocessWrite"] * 3]
)
def test_killed_actors_neither_lose_nor_duplicate_an_image(session, tmp_path, stages):
    # Waiting, so that actors are killed at work, and more of it than they take to start again.
    slow = {"read_ms": 30.0, "store_ms": 30.0}
    given = {"actors": 2, "writers": 2 if "Write" in stages else 0, "shard_rows": 5}
    wanted = settings(input="demo:300", output=tmp_path / "out", **given, **slow)
    stop = threading.Event()
    killed: list[int] = []
    titles = [f"MapBatches({stage})" for stage in stages]
    killer = threading.Thread(target=kill_workers, args=(titles, stop, killed))
    killer.start()
    try:
        report = run(wanted, console=quiet()).report
    finally:
        stop.set()
        killer.join()
    assert report["images_in"] == report["images_out"] == 300
    assert len(killed) == len(stages)
    plain_loop(wanted, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_an_image_that_kills_its_process_is_rejected_and_its_shard_is_delivered(
    session, photos, tmp_path
):
    import cv2

    from tests.support.killing import DieAtBright

    white = cv2.imencode(".jpg", np.full((100, 100, 3), 255, np.uint8))[1].tobytes()
    (photos / "a" / "white.jpg").write_bytes(white)
    recipe = Recipe(
        name="deadly", ops=(DieAtBright(), Resize(height=30, width=30, antialias=False))
    )
    catalog.RECIPES["deadly"] = recipe
    try:
        outcome = run(
            settings(
                input=photos,
                output=tmp_path / "out",
                recipe="deadly",
                max_reject_fraction=0.05,
                writers=0,
            ),
            console=quiet(),
        )
    finally:
        del catalog.RECIPES["deadly"]
    assert [(row.image_id, row.reason) for row in outcome.rejected] == [
        ("a/white.jpg", "kills its process")
    ]
    assert outcome.report["images_out"] == 60 == len(files(tmp_path / "out"))


def test_on_s3_too_results_never_go_where_the_input_is_nor_over_what_is_none(photos, bucket):
    for name in ("a/000.jpg", "a/001.jpg"):
        Location.of(bucket("in")).write(name, (photos / name).read_bytes())
    before = set(Location.of(bucket("in")).below())
    for output in ("in", "in/results"):
        with pytest.raises(UsageError, match="is the input folder"):
            plan(settings(input=bucket("in"), output=bucket(output)))
    Location.of(bucket("out")).write("a/001.jpg", b"the user's own")
    with pytest.raises(UsageError, match=r"a/001\.jpg.* exists and is no result"):
        plan(settings(input=bucket("in"), output=bucket("out")))
    assert set(Location.of(bucket("in")).below()) == before == {"a/000.jpg", "a/001.jpg"}
    assert set(Location.of(bucket("out")).below()) == {"a/001.jpg"}
    assert plan(settings(input=bucket("in"), output=bucket("fresh"))).left.num_rows == 2


@pytest.mark.parametrize("output", [".", "results/deep"])
def test_results_never_go_where_the_input_is(photos, output):
    before = files(photos)
    with pytest.raises(UsageError, match="is the input folder"):
        plan(settings(input=photos, output=photos / output))
    assert files(photos) == before


def test_a_file_that_is_no_result_is_never_overwritten(photos, tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/003.jpg").write_bytes(b"the user's own")
    with pytest.raises(UsageError, match=r"a/003\.jpg exists and is no result"):
        plan(settings(input=photos, output=tmp_path / "out"))
    assert not (tmp_path / "out/_raypipe").exists()


def test_images_go_below_the_output_whatever_the_input_is_called(photos, monkeypatch):
    monkeypatch.chdir(photos / "a")
    for spelling, folder in (("..", "photos"), (".", "a"), ("../b/", "b"), (str(photos), "photos")):
        assert image_folder(settings(input=spelling, annotations="boxes.json")) == folder


def test_the_users_annotations_are_never_overwritten_nor_deleted(photos, tmp_path):
    own = tmp_path / "annotations/boxes.json"
    own.parent.mkdir()
    images = [{"id": 1, "file_name": "a/000.jpg", "height": 101, "width": 151}]
    own.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    content = own.read_text()
    wanted = settings(input=photos, annotations=own, output=tmp_path, format="parquet")
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"annotations/boxes\.json exists and is no result"):
            plan(wanted.changed(resume=resume))
    # An earlier run without annotations wrote none. So --no-resume is refused and deletes nothing.
    outputs.put_made(Location.of(str(tmp_path)), outputs.Made(settings={"recipe": "coco-300"}))
    with pytest.raises(UsageError, match="exists and is no result"):
        plan(wanted.changed(resume=False))
    assert own.read_text() == content
    assert (tmp_path / "_raypipe/run.json").exists()


def test_annotation_ids_that_say_not_which_box_are_refused_where_they_are_written(photos, tmp_path):
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40]}
    (tmp_path / "boxes.json").write_text(
        json.dumps({"images": [{"id": 7, "file_name": "a/001.jpg"}], "annotations": [box, box]})
    )
    wanted = settings(input=photos, annotations=tmp_path / "boxes.json", output=tmp_path / "out")
    with pytest.raises(UsageError, match="the annotation id 1 occurs twice for the image '7'"):
        plan(wanted)
    assert plan(wanted.changed(output=None)).left.num_rows == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input": "no/such/folder"}, "no/such/folder"),
        ({"input": "demo", "recipe": "coco-30"}, "coco-300"),
        ({"input": "demo", "actors": 0}, "--actors is 0"),
        ({"input": "demo", "writers": -1}, "--writers is -1; it must be at least 0"),
        ({"input": "demo", "limit": -3}, "--limit is -3"),
        ({"input": "demo", "quality": 101}, "--quality is 101"),
        ({"input": "demo", "max_reject_fraction": 1.5}, "--max-reject-fraction is 1.5"),
        ({"input": "demo", "run_id": "a/b"}, "--run-id is 'a/b'"),
    ],
)
def test_bad_settings_are_refused_with_the_value_and_the_remedy(given, words):
    with pytest.raises(UsageError) as caught:
        plan(settings(**given))
    assert words in str(caught.value)


def test_an_output_that_cannot_be_written_to_is_refused_and_nothing_is_begun(session):
    with pytest.raises(UsageError, match="--output '/proc/no' cannot be written to"):
        run(settings(input="demo:8", output="/proc/no"), console=quiet())
