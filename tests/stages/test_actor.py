"""An actor without Ray: it does several steps in a row, and tracks what kills it."""

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from raypipe.data.sinks import FORMATS
from raypipe.data.tables import image_column
from raypipe.data.work import shards
from raypipe.run.execution import tracks
from raypipe.run.preprocess import preprocessing
from raypipe.stages.actor import TRIES, Actor, Tracks
from raypipe.stages.stage import Done
from tests.conftest import files
from tests.support.forks import forks
from tests.support.runs import plain_loop, settings


@dataclass
class Counted:
    """A meter that keeps what it is told."""

    counts: list[tuple[str | None, int, int, int]] = field(default_factory=list)

    def start(self, gpu=None) -> None: ...

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        yield

    def wait(self): ...

    def count(self, *, images: int, bytes_in: int, bytes_out: int, step: str | None = None) -> None:
        self.counts.append((step, images, bytes_in, bytes_out))


@pytest.fixture
def run_id() -> Iterator[str]:
    """A run whose position files on this machine are deleted."""
    name = f"acting-{os.getpid()}"
    with tracks(name):
        yield name


def actor_of(wanted, run_id: str) -> tuple[Actor, Counted, list[pa.Table]]:
    """The actor of the run's one stage, its meter, and the shards that it gets."""
    job = preprocessing(wanted.changed(writers=0))
    (stage,) = job.stages(run_id)
    meter = Counted()
    actor = Actor(steps=stage.steps, threads=1, gpu=False, meter=meter)
    return actor, meter, list(shards(job.todo.work))


@pytest.mark.parametrize(
    ("backend", "format"), [*(("opencv", name) for name in FORMATS), ("torchvision", "jpeg")]
)
def test_an_actor_that_writes_what_it_made_writes_what_a_plain_loop_does(
    photos, tmp_path, run_id, backend, format
):
    recipe = "coco-300-pt" if format == "npy" else "coco-300"
    given = {"backend": backend, "format": format, "recipe": recipe, "shard_rows": 20}
    wanted = settings(input=photos, output=tmp_path / "out", **given)
    actor, meter, work = actor_of(wanted, run_id)
    done = [actor(shard) for shard in work]
    plain_loop(wanted, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    assert sum(block.column("images")[0].as_py() for block in done) == 60
    # The stage takes in what its first step does, and puts out what its last one does.
    assert all(block.nbytes < 1000 for block in done)  # and no pixels
    steps, stage = meter.counts[:2], meter.counts[2]
    assert [name for name, *_ in meter.counts[:3]] == ["preprocess", "write", None]
    assert stage == (None, steps[0][1], steps[0][2], steps[1][3])
    assert steps[0][3] == pytest.approx(20 * 300 * 300 * 3, rel=0.01) and steps[1][2] == steps[0][3]


@dataclass(frozen=True)
class Spy:
    """A step that looks at its block, and at what the actor's successor would find."""

    tracks: Path
    seen: list = field(default_factory=list)

    name = "spy"
    libraries = "opencv"
    memory = 0
    wait_ms = 0.0

    def begin(self, *, threads: int, gpu: bool) -> "Spy":
        return self

    gpu = None

    def __call__(self, block: pa.Table) -> Done:
        (track,) = self.tracks.glob("*.at")
        where = np.frombuffer(image_column(block).buffers()[2], np.uint8).ctypes.data
        self.seen.append((where, struct.unpack("<qq?", track.read_bytes())))
        return Done(block=block.select(["shard"]), images=len(block), bytes_in=0, bytes_out=0)


def test_the_next_shard_gets_the_memory_of_one_that_is_written_and_no_image_the_blame(
    photos, run_id
):
    job = preprocessing(settings(input=photos, shard_rows=20))
    (stage,) = job.stages(run_id)
    spy = Spy(Path(stage.steps[0].tracks))
    actor = Actor(steps=(*stage.steps, spy), threads=1, gpu=False, meter=Counted())
    for shard in shards(job.todo.work):
        actor(shard)
    addresses = {where for where, _ in spy.seen}
    assert len(spy.seen) >= 3 and len(addresses) == 1
    # An actor that dies after its first step was at no image.
    assert {track for _, track in spy.seen} == {(-1, -1, False)}


def _die_at(folder: str, shard: int, row: int) -> None:
    Tracks(folder).mark(shard, row)
    os.kill(os.getpid(), signal.SIGKILL)


def test_tracks_outlive_their_process_and_blame_a_row_only_after_several_deaths(tmp_path):
    context = forks(__name__)

    def die(shard: int, row: int) -> None:
        process = context.Process(target=_die_at, args=(str(tmp_path), shard, row))
        process.start()
        process.join()

    tracks = Tracks(str(tmp_path))
    tracks.mark(7, 5)  # this process is at 7, 5 and alive: no death
    for _ in range(TRIES - 1):
        die(7, 5)
    die(7, 6)
    die(8, 5)
    assert Tracks(str(tmp_path)).killers(7) == {}
    die(7, 5)
    after = Tracks(str(tmp_path))  # as the actor that takes the place of the dead one has it
    assert {row: reject.reason for row, reject in after.killers(7).items()} == {
        5: "kills its process"
    }
    assert after.killers(8) == {}


def _compute_for_ever(folder: str) -> None:
    tracks = Tracks(folder, image_seconds=0.5)
    tracks.mark(7, 4)
    tracks.mark(7, 5)
    while True:
        cv2.GaussianBlur(np.zeros((500, 500), np.uint8), (31, 31), 5)


def _wait(folder: str) -> None:
    tracks = Tracks(folder, image_seconds=0.5)
    tracks.mark(7, 6)
    time.sleep(2)  # takes no CPU
    tracks.mark(-1, -1)
    for _ in range(300):
        cv2.GaussianBlur(np.zeros((500, 500), np.uint8), (31, 31), 5)


def test_an_image_that_takes_too_much_cpu_ends_its_process_and_is_blamed_at_once(tmp_path):
    context = forks(__name__)
    codes = []
    for target in (_compute_for_ever, _wait):
        process = context.Process(target=target, args=(str(tmp_path),))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL, 0]
    killers = Tracks(str(tmp_path), image_seconds=0.5).killers(7)
    assert {row: str(reject) for row, reject in killers.items()} == {
        5: "takes too long: more than --image-seconds 0.5 of CPU"
    }
