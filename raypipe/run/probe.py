"""Times a few images before a run starts, in a process of its own: an image that kills it costs an estimate, not the run.

    python -m raypipe.run.probe < pickled Probe

It runs while Ray starts, and imports no Ray. What is written goes to the run's folder for unfinished files, and is deleted.
"""

import json
import os
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import BinaryIO, Protocol, runtime_checkable

import pyarrow as pa

from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink
from raypipe.data.work import make_work
from raypipe.images import backend as backend_module
from raypipe.insight.planner import StageCost
from raypipe.stages.actor import keep_freed_memory
from raypipe.stages.preprocess import Preprocess, Preprocessing, preprocess_shard
from raypipe.stages.stage import Doing, Stage, Step

IMAGES = 32
ENOUGH_S = 1.0
"""Timing stops after so many images, or when this many seconds have passed and there is one timing of each stage."""

WAIT_AT_MOST_S = 10.0


@runtime_checkable
class Storing(Step, Protocol):
    """A step that stores what it makes. `wait_ms`: more than it takes, an image."""

    @property
    def sink(self) -> Sink:
        """Where to."""

    @property
    def wait_ms(self) -> float: ...

    def elsewhere(self, folder: Location) -> "Storing":
        """The same step, storing into `folder`, without waiting for anything."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to time: `rows` (schema WORK), of which the first few are enough, in preprocess and in the step after it.

    `may_be_on_gpu`: the step after holds one where there are enough.
    `stored`: also preprocess what was stored, as a training from a store does in every epoch.
    """

    rows: pa.Table
    first: Preprocess
    then: Storing | None = None
    may_be_on_gpu: bool = False
    threads: int = 1
    stored: bool = False
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def folder(self) -> Location:
        """Where the step after stores: beside unfinished files, as the output is not claimed yet."""
        assert self.then is not None
        sink = self.then.sink
        return sink.root / f"{sink.tmp}/probe-{self.token}"

    @cached_property
    def makes_root(self) -> bool:
        """Whether the output was missing when this was first asked: then it goes with the probe."""
        return self.then is not None and not self.then.sink.root.exists()


def of(rows: pa.Table, stages: Sequence[Stage], *, threads: int, stored: bool = False) -> Probe:
    """What to time of a pipeline: its first step, and the one that stores."""
    first, *others = (step for stage in stages for step in stage.steps)
    assert isinstance(first, Preprocess)
    return Probe(
        rows=rows,
        first=first,
        then=next((step for step in others if isinstance(step, Storing)), None),
        may_be_on_gpu=any(stage.gpu is not False for stage in stages),
        threads=threads,
        stored=stored,
    )


def start(probe: Probe) -> subprocess.Popen[bytes]:
    """Begin timing; `end` is for whatever happens meanwhile."""
    _ = probe.makes_root
    # Own ops live in modules that this process finds.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "raypipe.run.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the run, which ends it
    )
    assert process.stdin is not None
    try:
        pickle.dump(replace(probe, rows=probe.rows.slice(0, IMAGES)), process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass
    return process


@contextmanager
def started(probe: Probe) -> Iterator[subprocess.Popen[bytes]]:
    """`start`, and whatever happens meanwhile, it is over afterwards."""
    process = start(probe)
    try:
        yield process
    finally:
        end(process, probe)


def end(process: subprocess.Popen[bytes], probe: Probe) -> None:
    """It is over, and what it has stored is deleted, which it cannot do itself when it is killed."""
    process.kill()
    process.wait()
    if probe.then is not None:
        _tidy(probe)


def finish(process: subprocess.Popen[bytes]) -> list[StageCost] | None:
    """What the images cost (actors: 1 each); None: the timing failed, found no good image, or took too long."""
    assert process.stdout is not None
    try:
        process.wait(WAIT_AT_MOST_S)
        costs = [StageCost(**cost) for cost in json.loads(process.stdout.read() or b"[]")]
    except (subprocess.TimeoutExpired, ValueError, TypeError):
        return None
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    return costs or None


def time_stages(probe: Probe) -> list[StageCost]:
    """Costs an image, from one actor's work without Ray. Empty: no image was good.

    A step that would be on a GPU here is left out: GPUs decide its actors, and its cost on a CPU says nothing.
    """
    keep_freed_memory()
    first = probe.first
    backend_module(first.pixels.backend).setup(probe.threads)
    reader = replace(first.reading, patience_s=0.0).reader()
    waits_s = {first.name: first.wait_ms / 1000}
    then: dict[str, Doing] = {}
    if probe.then is not None and not (probe.may_be_on_gpu and _has_gpu()):
        step = probe.then.elsewhere(probe.folder)
        then[step.name] = step.begin(threads=probe.threads, gpu=False)
        waits_s[step.name] = probe.then.wait_ms / 1000
    # The first image pays for libraries that load, and for memory that is new.
    block, _ = preprocess_shard(probe.rows.slice(0, 1), first.pixels, reader=reader)
    for store in then.values():
        store(block)
    spent = dict.fromkeys(waits_s, (0.0, 0.0))
    images = 0
    begun = time.perf_counter()
    size = max(1, min(8, probe.rows.num_rows // 4))
    for at in range(0, probe.rows.num_rows, size):
        rows = probe.rows.slice(at, size)
        times = _now()
        block, _ = preprocess_shard(rows, first.pixels, reader=reader)
        spent[first.name] = _add(spent[first.name], times)
        for name, store in then.items():
            times = _now()
            store(block)
            spent[name] = _add(spent[name], times)
        images += rows.num_rows - block.column("image").null_count
        if time.perf_counter() - begun > ENOUGH_S:
            break
    if not images:
        return []
    costs = [
        StageCost(name=name, actors=1, busy_s=busy_s / images + waits_s[name], cpu_s=cpu_s / images)
        for name, (busy_s, cpu_s) in spent.items()
    ]
    if then and probe.stored:
        costs.append(_time_stored(probe.folder, first.pixels, reader))
    return costs


def _time_stored(folder: Location, pixels: Preprocessing, reader: Reader) -> StageCost:
    rows = make_work(list_images(str(folder)), rows_per_shard=IMAGES)
    for _ in range(2):  # the first time pays for what a reader keeps of a file
        times = _now()
        preprocess_shard(rows, pixels, reader=reader)
        busy_s, cpu_s = _add((0.0, 0.0), times)
    images = rows.num_rows
    return StageCost(name="stored", actors=1, busy_s=busy_s / images, cpu_s=cpu_s / images)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tidy(probe: Probe) -> None:
    """Delete what the probe stored, and the folders that nobody else has put anything into."""
    assert probe.then is not None
    probe.folder.delete_folder()
    root, tmp = probe.then.sink.root, probe.then.sink.tmp
    for folder in (
        root / tmp,
        root / tmp.partition("/")[0],
        *[root] * probe.makes_root,
    ):
        folder.delete_empty()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _add(spent: tuple[float, float], since: tuple[float, float]) -> tuple[float, float]:
    wall_s, cpu_s = (now - then for now, then in zip(_now(), since, strict=True))
    return spent[0] + wall_s, spent[1] + cpu_s


def main(stdin: BinaryIO) -> None:
    """Time what is described on `stdin`, and print the costs as JSON."""
    probe = pickle.load(stdin)
    try:
        costs = time_stages(probe)
    finally:
        if probe.then is not None:
            _tidy(probe)
    names = ("name", "actors", "busy_s", "cpu_s")
    print(json.dumps([{name: getattr(cost, name) for name in names} for cost in costs]))


if __name__ == "__main__":
    main(sys.stdin.buffer)
