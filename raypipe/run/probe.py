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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import BinaryIO

import pyarrow as pa

from raypipe.data import location
from raypipe.data.listing import list_images
from raypipe.data.reader import Reader, Reading
from raypipe.data.work import make_work
from raypipe.images import backend as backend_module
from raypipe.insight.planner import StageCost
from raypipe.stages import After, Gpu
from raypipe.stages.preprocess import Preprocessing, keep_freed_memory, preprocess_shard

IMAGES = 32
ENOUGH_S = 1.0
"""Timing stops after so many images, or when this many seconds have passed and there is one timing of each stage."""

WAIT_AT_MOST_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to time: `rows` (schema WORK), of which the first few are enough, in preprocess and the stage `after` it, where there is one.
    `stored`: also preprocessing what `after` has stored, as a training from a store does in every epoch."""

    rows: pa.Table
    settings: Preprocessing
    after: After | None
    threads: int
    reading: Reading
    read_ms: float
    store_ms: float
    stored: bool = False
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def folder(self) -> str:
        """Where what it stores goes: beside unfinished files, and its own, as the output is not claimed yet."""
        assert self.after is not None
        return location.join(self.after.sink.root, f"{self.after.sink.tmp}/probe-{self.token}")

    @cached_property
    def makes_root(self) -> bool:
        """Whether the output was missing when this was first asked: then it goes with the probe."""
        return self.after is not None and not location.exists(self.after.sink.root)


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
    if probe.after is not None:
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
    """Costs an image, from one actor's work without Ray. Empty: no image was good. A stage that may be on a GPU here is left out: how many
    GPUs there are decides its actors, and what it costs on a CPU says nothing."""
    keep_freed_memory()
    backend_module(probe.settings.backend).setup(probe.threads)
    reader = replace(probe.reading, patience_s=0.0).reader()
    after = (
        {}
        if probe.after is None or _may_be_on_gpu(probe.after)
        else {probe.after.name: _actor(probe)}
    )
    # The first image pays for libraries that load, and for memory that is new.
    block, _ = preprocess_shard(probe.rows.slice(0, 1), probe.settings, reader=reader)
    for store in after.values():
        store(block)
    spent = dict.fromkeys(["preprocess", *after], (0.0, 0.0))
    images = 0
    begun = time.perf_counter()
    size = max(1, min(8, probe.rows.num_rows // 4))
    for at in range(0, probe.rows.num_rows, size):
        rows = probe.rows.slice(at, size)
        times = _now()
        block, _ = preprocess_shard(rows, probe.settings, reader=reader)
        spent["preprocess"] = _add(spent["preprocess"], times)
        for name, store in after.items():
            times = _now()
            store(block)
            spent[name] = _add(spent[name], times)
        images += rows.num_rows - block.column("image").null_count
        if time.perf_counter() - begun > ENOUGH_S:
            break
    if not images:
        return []
    waits = {
        name: (probe.read_ms if name == "preprocess" else probe.store_ms) / 1000 for name in spent
    }
    costs = [
        StageCost(name=name, actors=1, busy_s=busy_s / images + waits[name], cpu_s=cpu_s / images)
        for name, (busy_s, cpu_s) in spent.items()
    ]
    if probe.after is not None and probe.stored:
        costs.append(_time_stored(probe.folder, probe.settings, reader))
    return costs


def _time_stored(folder: str, settings: Preprocessing, reader: Reader) -> StageCost:
    rows = make_work(list_images(folder), rows_per_shard=IMAGES)
    for _ in range(2):  # the first time pays for what a reader keeps of a file
        times = _now()
        preprocess_shard(rows, settings, reader=reader)
        busy_s, cpu_s = _add((0.0, 0.0), times)
    return StageCost(
        name="stored", actors=1, busy_s=busy_s / rows.num_rows, cpu_s=cpu_s / rows.num_rows
    )


class _Unmeasured:
    """A stage's meter for an actor outside Ray."""

    def start(self, gpu: Gpu | None = None) -> None: ...

    def call(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, *, images: int, bytes_in: int, bytes_out: int) -> None: ...


def _actor(probe: Probe) -> Callable[[pa.Table], pa.Table]:
    """One of the stage's actors, here, with a folder of its own for what it stores."""
    after = probe.after
    assert after is not None
    sink = replace(after.sink, root=probe.folder)
    return after.actor(
        sink=sink, threads=probe.threads, wait_ms=0.0, meter=_Unmeasured(), **after.arguments
    )


def _may_be_on_gpu(after: After) -> bool:
    if after.gpu is False:
        return False
    import torch

    return torch.cuda.is_available()


def _tidy(probe: Probe) -> None:
    """Delete what the probe stored, and the folders that nobody else has put anything into."""
    assert probe.after is not None
    location.delete_folder(probe.folder)
    root, tmp = probe.after.sink.root, probe.after.sink.tmp
    for folder in (
        location.join(root, tmp),
        location.join(root, tmp.partition("/")[0]),
        *[root] * probe.makes_root,
    ):
        location.delete_empty(folder)


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
        if probe.after is not None:
            _tidy(probe)
    print(
        json.dumps(
            [
                {"name": c.name, "actors": c.actors, "busy_s": c.busy_s, "cpu_s": c.cpu_s}
                for c in costs
            ]
        )
    )


if __name__ == "__main__":
    main(sys.stdin.buffer)
