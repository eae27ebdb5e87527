"""What a run changes in its output, and when: nothing before it is certain that it can go on."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from raypipe import UsageError
from raypipe.data import journal, outputs
from raypipe.data.journal import Entry, Written
from raypipe.data.location import Location
from raypipe.data.outputs import Made
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.run.preprocess import plan, run
from raypipe.run.result import covers, is_report
from raypipe.sweep.command import look
from raypipe.sweep.settings import Settings as Sweep
from raypipe.train.attempts import run as train
from raypipe.train.settings import Settings as Train
from tests.conftest import ROOT, files, jpeg, tree
from tests.data.test_lease import HOLD
from tests.support.clusters import environment
from tests.support.runs import plain_loop, quiet, settings

pytestmark = pytest.mark.xdist_group("claim")  # one process makes the output that they start from


# --- A. looking changes nothing


def test_a_run_that_has_no_room_deletes_nothing(wanted):
    before = tree(Path(wanted.writing.output))
    refused = "1000 preprocess actors take 1000 CPUs, one each, but the cluster has 8"
    with pytest.raises(UsageError, match=refused):
        run(wanted.changed(actors=1000, resume=False), console=quiet())
    assert tree(Path(wanted.writing.output)) == before


@pytest.fixture
def taken(session):
    """A run of another driver of this cluster, whose id is `taken`."""

    class Other:
        pass

    name = {"name": "raypipe-taken", "namespace": "raypipe", "num_cpus": 0}
    actor = ray.remote(Other).options(**name).remote()
    yield
    ray.kill(actor)


def test_an_id_of_a_run_that_is_under_way_is_refused_before_anything_is_deleted(wanted, taken):
    before = tree(Path(wanted.writing.output))
    with pytest.raises(UsageError, match="--run-id taken is the id of a run in progress"):
        run(wanted.changed(run_id="taken", resume=False), console=quiet())
    assert tree(Path(wanted.writing.output)) == before


def test_a_training_without_the_gpus_asked_for_deletes_nothing(session, trained_somewhere):
    before = tree(Path(trained_somewhere))
    given = {"storage": trained_somewhere, "input": "demo:24", "gpu": True, "resume": False}
    with pytest.raises(UsageError, match="--gpu with 1 workers needs as many GPUs"):
        train(Train.of(**given), console=quiet())
    assert tree(Path(trained_somewhere)) == before


def test_a_storage_or_a_sweeps_output_with_results_of_another_job_is_refused(wanted):
    before = tree(Path(wanted.writing.output))
    for resume in (True, False):
        given = {"storage": wanted.writing.output, "input": "demo:24", "resume": resume}
        with pytest.raises(UsageError, match=r"--storage .* has the results of another job"):
            train(Train.of(**given), console=quiet())
        given = {"output": wanted.writing.output, "input": "demo:24", "resume": resume}
        with pytest.raises(UsageError, match=r"--output .* has the results of another job"):
            look(Sweep.of(**given))
    assert tree(Path(wanted.writing.output)) == before


def test_a_store_that_does_not_answer_says_nothing_of_a_report(wanted, monkeypatch):
    root = Location.of(wanted.writing.output)
    work = plan(wanted).work
    assert covers(root, work) and is_report(root / "_raypipe")
    whole = Location.read

    def read(place: Location) -> bytes:
        if place.name == "report.json":
            raise OSError("HTTP 503")
        return whole(place)

    monkeypatch.setattr(Location, "read", read)
    for ask in (lambda: covers(root, work), lambda: is_report(root / "_raypipe")):
        with pytest.raises(OSError, match="503"):
            ask()


@pytest.mark.parametrize(
    ("job", "address", "said"),
    [
        ("preprocess", "ray://127.0.0.1:1", "Ray Client's address: runs can be watched"),
        ("train", "127.0.0.1:1", "no Ray cluster answers there"),
    ],
)
def test_a_cluster_that_does_not_answer_is_told_at_once_and_nothing_is_deleted(
    wanted, tmp_path, trained_somewhere, job, address, said
):
    there = {"preprocess": wanted.writing.output, "train": trained_somewhere}[job]
    place = {"preprocess": "--output", "train": "--storage"}[job]
    before = tree(Path(there))
    command = [
        sys.executable,
        f"jobs/{job}.py",
        "--input",
        wanted.source.input if job == "preprocess" else "demo:24",
        place,
        there,
    ]
    command += [
        "--no-resume",
        *(
            ["--max-reject-fraction", "0.1", "--shard-rows", "4"]
            if job == "preprocess"
            else ["--epochs", "1"]
        ),
    ]
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(RAY_ADDRESS=address),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done
    assert said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert time.monotonic() - began < 60  # Ray alone would ask for 600 s
    assert tree(Path(there)) == before


@pytest.fixture
def trained_somewhere(tmp_path):
    """A --storage with a checkpoint of some training, and a file of the user's beside it."""
    folder = tmp_path / "storage/run-1/checkpoint-0001-000000001"
    checkpoints.save(
        str(folder),
        Checkpoint(settings={}, progress=Progress(epoch=1, step=1, rows=1), seen={}, state={}),
    )
    (folder / "notes.txt").write_text("the user's own")
    return str(tmp_path / "storage")


def test_nobody_who_speaks_rays_protocol_is_told_within_seconds(wanted):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        command = [sys.executable, "jobs/preprocess.py", "--input", "demo:8"]
        env = environment(RAY_ADDRESS=f"127.0.0.1:{silent.getsockname()[1]}")
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2 and "no answer in 10 s" in " ".join(done.stderr.split()), done


def test_an_output_that_another_driver_writes_to_is_refused_and_stays(wanted):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, wanted.writing.output],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    before = tree(Path(wanted.writing.output))
    try:
        for resume in (True, False):
            with pytest.raises(UsageError, match=rf"run other of process {process.pid}"):
                run(wanted.changed(resume=resume), console=quiet())
        assert tree(Path(wanted.writing.output)) == before
    finally:
        process.kill()
        process.wait()
    assert run(wanted, console=quiet()).report is None  # free at once


def test_two_drivers_at_the_same_time_one_of_them_is_refused(joined, tmp_path):
    command = [
        sys.executable,
        "jobs/preprocess.py",
        "--input",
        "demo:60",
        "--output",
        str(tmp_path / "out"),
        "--actors",
        "1",
    ]
    command += ["--writers", "1", "--read-ms", "30"]
    env = joined
    both = [
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (refusal,) = (text for process, text in zip(both, said, strict=True) if process.returncode == 2)
    assert "is being written by another driver" in " ".join(refusal.split())
    assert (
        len(files(tmp_path / "out")) == 60 and not (tmp_path / "out/_raypipe/lease.json").exists()
    )


# --- clearing

CLEAR = """if True:
    import sys, time
    from raypipe.data import outputs
    from raypipe.data.location import Location

    real, left = Location.delete, int(sys.argv[2])

    def few(place):
        global left
        real(place)
        left -= 1
        if not left:
            print("there", flush=True)
            time.sleep(600)

    Location.delete = few
    outputs.clear(Location.of(sys.argv[1]))
"""
"""Clears an output, and hangs after so many deletions."""


@pytest.mark.parametrize("after", [6, 20])
def test_clearing_that_was_interrupted_is_finished_by_the_next_run(wanted, after, tmp_path):
    root = Path(wanted.writing.output)
    process = subprocess.Popen(
        [sys.executable, "-c", CLEAR, wanted.writing.output, str(after)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    process.kill()
    process.wait()
    assert (root / "_raypipe/clearing").exists() and len(files(root)) < 23
    todo = plan(wanted)
    assert todo.left.num_rows == 24  # not: nothing to do
    report = run(wanted, console=quiet()).report
    assert (report["images_out"], report["images_rejected"], report["images_done_before"]) == (
        23,
        1,
        0,
    )
    plain_loop(wanted, tmp_path / "plain")
    assert files(root) == files(tmp_path / "plain")
    assert not (root / "_raypipe/clearing").exists()


def test_a_damaged_entry_does_not_stop_clearing(wanted):
    root = Path(wanted.writing.output)
    (root / "_raypipe/journal/000000002.json").write_bytes(b"{")
    (root / "mine.jpg").write_bytes(b"the user's own")
    (root / "_raypipe/notes.txt").write_bytes(b"the user's own")
    lines = outputs.clear(Location.of(wanted.writing.output))
    assert any("000000002.json" in line for line in lines)
    # Its results too: run.json and work.parquet say what they are called.
    assert sorted(tree(root)) == ["_raypipe/notes.txt", "mine.jpg"]


@pytest.mark.parametrize("where", ["files", "written", "endings", "results"])
@pytest.mark.parametrize("kind", ["absolute", "above", "link", "state"])
def test_a_name_that_leads_out_deletes_nothing(tmp_path, where, kind):
    victim = tmp_path / "victim.jpg"
    victim.write_bytes(b"the user's own")
    root = tmp_path / "out"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/victim.jpg").write_bytes(b"the user's own")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    name = {
        "absolute": str(victim),
        "above": "../victim.jpg",
        "link": "link/victim.jpg",
        "state": "_raypipe/../../victim.jpg",
    }[kind]
    written = [
        Written(image_id="a", file=name if where == "written" else "a.jpg", height=1, width=1)
    ]
    entry = Entry(
        epoch=0,
        shard=1,
        written=written,
        rejected=[],
        files=[name] if where == "files" else [],
        bytes=1,
    )
    place = Location.of(str(root))
    journal.put_entry(place, entry)
    made = Made(
        settings={}, endings=(name,) * (where == "endings"), results=(name,) * (where == "results")
    )
    outputs.put_made(place, made)
    journal.put_work(place, plan(settings(input="demo:3")).work)
    outputs.clear(place)
    assert victim.exists() and (tmp_path / "elsewhere/victim.jpg").exists()
    assert sorted(path.name for path in root.iterdir()) == ["link"]


def test_checkpoints_behind_a_link_and_files_beside_them_stay(trained_somewhere, tmp_path):
    storage = Path(trained_somewhere)
    folder = storage / "run-1/checkpoint-0001-000000001"
    outside = tmp_path / "elsewhere/checkpoint-0002-000000002"
    subprocess.run(["cp", "-r", str(folder), str(outside.parent) + "/"], check=False)
    outside.parent.mkdir(exist_ok=True)
    subprocess.run(["cp", "-r", str(folder), str(outside)], check=True)
    (storage / "run-1/checkpoint-0002-000000002").symlink_to(outside)
    lines = checkpoints.prune(str(storage))
    assert len(lines) == 1 and "leads out of" in lines[0]
    assert (
        (outside / "about.json").exists()
        and (folder / "notes.txt").exists()
        and not (folder / "about.json").exists()
    )


def test_a_users_report_is_never_overwritten(photos, tmp_path):
    for name in ("report.json", "report.html", "rejects.parquet"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(
            UsageError, match=rf"--report .* has a {name} that is no report of raypipe"
        ):
            plan(settings(input=photos, report=folder))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--report .* is a file"):
        plan(settings(input=photos, report=tmp_path / "file"))


def test_results_that_appear_beside_the_journal_are_not_overwritten(wanted, made):
    """Also where the input has grown: what is new must not go over the user's files."""
    late = made / "in/late.jpg"
    late.write_bytes(jpeg(99))
    try:
        (Path(wanted.writing.output) / "late.jpg").write_bytes(b"the user's own")
        with pytest.raises(UsageError, match=r"late\.jpg exists and is no result"):
            run(wanted, console=quiet())
    finally:
        late.unlink()


@pytest.mark.parametrize(
    ("format", "name"), [("parquet", "part-000000.parquet"), ("webdataset", "shard-000000.tar")]
)
def test_shards_too_are_never_written_over_a_users_file(photos, tmp_path, format, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"the user's own")
    with pytest.raises(UsageError, match=rf"{name} exists and is no result"):
        plan(settings(input=photos, output=tmp_path / "out", format=format))
