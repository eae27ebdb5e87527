"""A sweep on a real local Ray: small, but all of it; and as a user runs it, with Ctrl-C."""

import csv
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data.location import Location
from raypipe.sweep import curves
from raypipe.sweep.command import run
from raypipe.sweep.measure import RESULTS, read_results
from raypipe.sweep.settings import Settings
from tests.support.clusters import wait_for
from tests.support.pages import Reader
from tests.support.runs import quiet

ROOT = Path(__file__).parents[2]


def settings(root: Path, **given) -> Settings:
    tiny = {
        "input": "demo:24",
        "output": str(root / "out"),
        "actors": (1, 2),
        "backends": ("opencv",),
        "repeats": 1,
        "limit": 24,
        "shard_rows": 3,
    }
    return Settings.of(**tiny | given)


def slow_store(root: Path, **given) -> Settings:
    return settings(root, store_ms=20.0, **given)


@pytest.fixture(scope="module")
def swept(session, tmp_path_factory) -> Path:
    """A folder with the results of the smallest sweep that has all kinds of points."""
    root = tmp_path_factory.mktemp("swept")
    console = quiet()
    outcome = run(slow_store(root), console=console)
    assert outcome.failure is None
    assert "6/6 " in console.file.getvalue() and "0 s left" in console.file.getvalue()
    return root


@pytest.mark.xdist_group("swept")
def test_a_sweep_measures_every_point_and_leaves_nothing_but_its_results(swept):
    rows = read_results(Location.of(str(swept / "out")))
    assert Counter((r["kind"], r["actors"], r["writers"]) for r in rows) == {
        **{("preprocess", a, w): 1 for a, w in ((1, 0), (2, 0), (1, 1), (2, 1), (2, 2))},
        ("store", 2, 2): 1,
        ("stored", 2, 0): 1,
    }
    for row in rows:
        assert row["images"] == 24 and row["threads"] == 1 and row["repeat"] == 0
        assert row["time_s"] > 0 and row["images_per_s"] == pytest.approx(24 / row["time_s"])
        assert 0 < row["cpu_percent"] <= 101
        assert row["preprocess_busy_s"] > 0 and row["preprocess_cpu_s"] > 0
        assert (row["write_busy_s"] is not None) == (row["writers"] > 0)
        assert row["limit"] in ("preprocess", "write", "cores")
        assert row["gpu_percent"] is None
    # Pixels that were stored are read back: no decoding.
    cost = {row["kind"]: row["preprocess_cpu_s"] for row in rows if row["kind"] != "preprocess"}
    assert cost["stored"] < cost["store"]
    left = sorted(
        p.relative_to(swept / "out").as_posix() for p in (swept / "out").rglob("*") if p.is_file()
    )
    assert left == ["_raypipe/run.json", "results.csv", "results.parquet", "sweep.html"]


@pytest.mark.xdist_group("swept")
def test_a_delayed_store_delays_each_writer_and_the_page_says_so(swept):
    rows = read_results(Location.of(str(swept / "out")))
    took = {(r["actors"], r["writers"]): r["time_s"] for r in rows if r["kind"] == "preprocess"}
    # 24 images of 20 ms, one after the other or two at a time: that shows on any machine.
    assert took[1, 1] >= 0.48 and took[2, 1] >= 0.48 and took[2, 2] >= 0.24
    assert "20 ms longer to write" in (swept / "out/sweep.html").read_text()


@pytest.mark.xdist_group("swept")
def test_the_table_is_there_as_csv_too(swept):
    with (swept / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(swept / "out/results.parquet")
    assert list(rows[0]) == table.column_names == RESULTS.names
    assert [float(row["time_s"]) for row in rows] == pytest.approx(
        table.column("time_s").to_pylist()
    )


@pytest.mark.xdist_group("swept")
def test_the_page_shows_the_claims_and_how_it_was_measured(swept):
    tree = Reader((swept / "out/sweep.html").read_text()).open[0]
    assert "Preprocessing only: time" in {e.text for e in tree.all("h3")}
    assert len(tree.all("tbody")[0].all("tr")) == 15
    assert "demo:24" in tree.text


@pytest.mark.xdist_group("swept")
def test_the_same_command_measures_nothing_again_and_a_larger_grid_only_what_is_new(swept, session):
    before = {row["run_id"]: row for row in read_results(Location.of(str(swept / "out")))}
    console = quiet()
    run(slow_store(swept), console=console)
    assert {row["run_id"]: row for row in read_results(Location.of(str(swept / "out")))} == before
    assert "6 of 6 points are measured already" in console.file.getvalue()
    run(slow_store(swept, actors=(1, 2), writers=("none", "fused")), console=quiet())
    after = {row["run_id"]: row for row in read_results(Location.of(str(swept / "out")))}
    assert {key: after[key] for key in before} == before
    fresh = {r["actors"]: r for key, r in after.items() if key not in before}
    assert {(n, r["kind"], r["writers"]) for n, r in fresh.items()} == {
        (1, "fused", 0),
        (2, "fused", 0),
    }
    assert fresh[1]["write_busy_s"] > 0 and fresh[1]["preprocess_busy_s"] > 0
    assert "Actors that write themselves: time" in (swept / "out/sweep.html").read_text()


@pytest.mark.xdist_group("swept")
def test_other_settings_into_the_same_folder_are_refused_with_the_difference(swept):
    before = (swept / "out/results.parquet").read_bytes()
    with pytest.raises(UsageError) as caught:
        run(settings(swept, limit=10, store_ms=5.0), console=quiet())
    said = str(caught.value)
    assert (
        "limit: 24 there, 10 now" in said
        and "store_ms: 20.0 there, 5.0 now" in said
        and "--no-resume" in said
    )
    with pytest.raises(UsageError, match="shard_rows: 3 there, 1 now"):
        run(slow_store(swept, shard_rows=None, actors=(1, 2, 3)), console=quiet())
    assert (swept / "out/results.parquet").read_bytes() == before


def test_no_resume_starts_again(session, tmp_path):
    one = settings(tmp_path, actors=(1,), writers=("none",))
    run(one, console=quiet())
    first = read_results(one.grid.root)
    run(one.changed(limit=12, resume=False), console=quiet())
    (row,) = read_results(one.grid.root)
    assert row["images"] == 12 and row["run_id"] != first[0]["run_id"]


def test_a_point_that_rejects_too_much_ends_the_sweep_as_failed_and_what_was_measured_is_kept(
    session, photos, tmp_path
):
    for name in ("a/000.jpg", "a/001.jpg"):
        (photos / name).write_bytes(b"no image")
    given = settings(tmp_path, input=str(photos), limit=60, actors=(1,), writers=("none",))
    outcome = run(given, console=quiet())
    assert (
        "2 of 60 images were rejected" in outcome.failure and "opencv, 1 actor" in outcome.failure
    )
    assert run(given.changed(max_reject_fraction=0.1), console=quiet()).failure is None


@pytest.mark.soak
def test_training_is_measured_and_on_a_cpu_it_is_said_that_there_is_no_gpu(session, tmp_path):
    (tmp_path / "small.json").write_text(
        '{"name": "small", "ops": [{"op": "Resize", "height": 64, "width": 64}], '
        '"needs_boxes": true}'
    )
    given = settings(
        tmp_path,
        writers=("none",),
        actors=(1,),
        train=True,
        train_recipe=str(tmp_path / "small.json"),
        train_actors=(1, 2),
        workers=(1,),
    )
    outcome = run(given, console=quiet())
    assert outcome.failure is None
    trained = [row for row in read_results(given.grid.root) if row["kind"] == "train"]
    assert {(row["actors"], row["workers"], row["device"]) for row in trained} == {
        (1, 1, "cpu"),
        (2, 1, "cpu"),
    }
    for row in trained:
        assert row["images"] == 24 and row["time_s"] > 0 and row["train_busy_s"] > 0
    (finding,) = [finding for finding in outcome.findings if finding.claim == 17]
    assert finding.holds == "cannot" and "no GPU" in finding.why


@pytest.mark.slow
def test_a_sweep_that_is_told_to_end_keeps_what_was_measured_and_the_same_command_goes_on(
    tmp_path, joined
):
    command = [
        sys.executable,
        "jobs/sweep.py",
        "--input",
        "demo:30",
        "--output",
        str(tmp_path / "out"),
        "--limit",
        "30",
    ]
    command += [
        "--actors",
        "1",
        "2",
        "--backends",
        "opencv",
        "--writers",
        "none",
        "--repeats",
        "1",
    ]
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env=joined,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for((tmp_path / "out/results.parquet").exists, first)
        first.send_signal(signal.SIGTERM)  # as `ray job stop` does; for Ctrl-C see test_job
        _, said = first.communicate(timeout=120)
    finally:
        if first.poll() is None:
            first.kill()
    assert first.returncode == 130 and "SIGTERM" not in said and "Traceback" not in said, said
    assert "The same command goes on from there" in " ".join(said.split())
    kept = {row["run_id"] for row in read_results(Location.of(str(tmp_path / "out")))}
    assert len(kept) == 1 and (tmp_path / "out/sweep.html").exists()

    second = subprocess.run(
        command, cwd=ROOT, env=joined, capture_output=True, text=True, timeout=300
    )
    assert second.returncode == 0, second.stderr
    rows = read_results(Location.of(str(tmp_path / "out")))
    assert kept < {row["run_id"] for row in rows} and len(rows) == 2
    assert "cannot be shown" in " ".join(second.stdout.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"actors": (0, 1)}, "--actors is 0 1"),
        ({"actors": ()}, "--actors is empty"),
        ({"writers": ()}, "--writers is empty"),
        ({"backends": ()}, "--backends is empty"),
        ({"threads": (0,)}, "--threads is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"limit": 0}, "--limit is 0"),
        ({"store_ms": -1.0}, "--store-ms is -1.0"),
        ({"quality": 0}, "--quality is 0"),
        ({"recipe": "coco-30"}, "coco-300"),
        ({"input": "no/such/folder"}, "no/such/folder"),
        ({"output": "/proc/no"}, "cannot be written to"),
        ({"train": True, "epochs": 0}, "--epochs is 0"),
    ],
)
def test_bad_settings_are_refused_with_the_value_and_nothing_is_started(tmp_path, given, words):
    with pytest.raises(UsageError) as caught:
        run(settings(tmp_path, **given), console=quiet())
    assert words in str(caught.value)
    assert not (tmp_path / "out/results.parquet").exists()


def test_results_never_go_where_the_input_is(photos):
    with pytest.raises(UsageError, match="is the input folder"):
        run(settings(photos.parent, input=str(photos), output=str(photos / "out")), console=quiet())


def test_a_table_that_is_none_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.parquet").write_bytes(b"no table")
    with pytest.raises(
        UsageError,
        match=r"cannot read the table of a sweep's results .*results\.parquet: .* "
        r"Remove it to measure again",
    ):
        read_results(Location.of(str(tmp_path / "out")))


def test_the_stages_of_a_row_are_those_that_claims_read():
    columns = set(RESULTS.names)
    assert {
        f"{stage}_{what}"
        for stage in curves.STAGES
        for what in ("busy_s", "cpu_s", "core_wait_s", "blocked")
    } <= columns
