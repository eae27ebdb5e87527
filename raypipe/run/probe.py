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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO

import pyarrow as pa

from raypipe.data import location
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink
from raypipe.data.sources import list_images
from raypipe.data.work import make_work
from raypipe.images import backend as backend_module
from raypipe.insight.planner import StageCost
from raypipe.stages.preprocess import Preprocessing, keep_freed_memory, preprocess_shard
from raypipe.stages.write import write_block

IMAGES = 32
ENOUGH_S = 1.0
"""Timing stops after so many images, or when this many seconds have passed and there is one timing of each stage."""

WAIT_AT_MOST_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to time: `rows` (schema WORK), of which the first few are enough. `sink` None: nothing is written. `stored`: also preprocessing
    what was written, as a training from a store does in every epoch."""

    rows: pa.Table
    settings: Preprocessing
    sink: Sink | None
    threads: int
    io_threads: int
    read_ms: float
    store_ms: float
    stored: bool = False


def start(probe: Probe) -> subprocess.Popen[bytes]:
    """Begin timing."""
    # Own ops live in modules that this process finds.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
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
        process.kill()


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
    """Costs an image, from one actor's work without Ray. Empty: no image was good."""
    keep_freed_memory()
    backend_module(probe.settings.backend).setup(probe.threads)
    reader = Reader(threads=probe.io_threads)
    sink = None
    if probe.sink is not None:
        sink = replace(probe.sink, root=_folder(probe.sink))
    # The first image pays for libraries that load, and for memory that is new.
    preprocess_shard(probe.rows.slice(0, 1), probe.settings, reader=reader)
    spent: dict[str, tuple[float, float]] = {"preprocess": (0.0, 0.0)} | ({"write": (0.0, 0.0)} if sink else {})
    images = 0
    begun = time.perf_counter()
    size = max(1, min(8, probe.rows.num_rows // 4))
    for at in range(0, probe.rows.num_rows, size):
        rows = probe.rows.slice(at, size)
        times = _now()
        block, _ = preprocess_shard(rows, probe.settings, reader=reader)
        spent["preprocess"] = _add(spent["preprocess"], times)
        if sink is not None:
            times = _now()
            write_block(
                block, sink, backend=probe.settings.backend, finish=probe.settings.recipe.finish if sink.format == "npy" else None
            )
            spent["write"] = _add(spent["write"], times)
        images += rows.num_rows - block.column("image").null_count
        if time.perf_counter() - begun > ENOUGH_S:
            break
    if not images:
        return []
    waits = {"preprocess": probe.read_ms / 1000, "write": probe.store_ms / 1000}
    costs = [
        StageCost(name=name, actors=1, busy_s=busy_s / images + waits[name], cpu_s=cpu_s / images)
        for name, (busy_s, cpu_s) in spent.items()
    ]
    return costs + ([_time_stored(sink, probe.settings, reader)] if sink is not None and probe.stored else [])


def _time_stored(sink: Sink, settings: Preprocessing, reader: Reader) -> StageCost:
    rows = make_work(list_images(sink.root), rows_per_shard=IMAGES)
    for _ in range(2):  # the first time pays for what a reader keeps of a file
        times = _now()
        preprocess_shard(rows, settings, reader=reader)
        busy_s, cpu_s = _add((0.0, 0.0), times)
    return StageCost(name="stored", actors=1, busy_s=busy_s / rows.num_rows, cpu_s=cpu_s / rows.num_rows)


def _folder(sink: Sink) -> str:
    return location.join(sink.root, f"{sink.tmp}/probe")


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
        if probe.sink is not None:
            location.delete_folder(_folder(probe.sink))
    print(json.dumps([{"name": c.name, "actors": c.actors, "busy_s": c.busy_s, "cpu_s": c.cpu_s} for c in costs]))


if __name__ == "__main__":
    main(sys.stdin.buffer)
