"""Times a few images before a run starts, in a process of its own.

    python -m raypipe.run.probe < pickled Probe

An image that kills the process costs an estimate, not the run. The probe runs while Ray starts, and
imports no Ray. It writes to the run's folder for unfinished files, and deletes that afterwards.
"""

import json
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import BinaryIO, Protocol, runtime_checkable

import pyarrow as pa

from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.reader import Reader, core_wait_s
from raypipe.data.sinks import Sink
from raypipe.data.work import make_work
from raypipe.images import backend as backend_module
from raypipe.insight.planner import StageCost
from raypipe.run import processes
from raypipe.stages.actor import keep_freed_memory
from raypipe.stages.planning import Preprocessing
from raypipe.stages.preprocess import Preprocess, preprocess_shard
from raypipe.stages.stage import Doing, Stage, Step

IMAGES = 32
ENOUGH_S = 1.0
"""Timing stops after IMAGES, or after ENOUGH_S once there is a timing of each stage."""

WAIT_AT_MOST_S = 10.0


@runtime_checkable
class Storing(Step, Protocol):
    """A step that stores what it makes. `wait_ms`: milliseconds to add to each image."""

    @property
    def sink(self) -> Sink:
        """Where it stores."""

    @property
    def wait_ms(self) -> float: ...

    def elsewhere(self, folder: Location) -> "Storing":
        """The same step, storing into `folder`, without `wait_ms`."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to time: the first few rows, in preprocess and in the step after it.

    rows: of schema WORK.
    may_be_on_gpu: whether the step after holds a GPU if there are enough.
    stored: also time preprocessing what was stored, as a training from a store does each epoch.
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
        """Where the step after stores: with unfinished files, as the output is not claimed yet."""
        assert self.then is not None
        sink = self.then.sink
        return sink.root / f"{sink.tmp}/probe-{self.token}"

    @cached_property
    def makes_root(self) -> bool:
        """Whether the output did not exist at the first call: then it is deleted with the probe."""
        return self.then is not None and not self.then.sink.root.exists()


def of(rows: pa.Table, stages: Sequence[Stage], *, threads: int, stored: bool = False) -> Probe:
    """Choose what to time of a pipeline: its first step, and the one that stores."""
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


def start(
    probe: Probe, begin: Callable[..., subprocess.Popen[bytes]] = processes.start
) -> subprocess.Popen[bytes]:
    """Start the process. Call `end` in any case."""
    _ = probe.makes_root
    # Own ops are in modules that only this process may find.
    process = begin(
        "raypipe.run.probe",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    try:
        pickle.dump(replace(probe, rows=probe.rows.slice(0, IMAGES)), process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass
    return process


@contextmanager
def started(
    probe: Probe, begin: Callable[..., subprocess.Popen[bytes]] = processes.start
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process, and end it afterwards in any case.

    Args:
        begin: starts a module of raypipe.
    """
    process = start(probe, begin)
    try:
        yield process
    finally:
        end(process, probe)


def end(process: subprocess.Popen[bytes], probe: Probe) -> None:
    """Kill the process, and delete what it has stored."""
    _kill(process)
    if probe.then is not None:
        _tidy(probe)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.stdout is not None
    if not process.stdout.closed:
        # `process` may only wait for a fork. The kernel kills that, and then its output ends.
        with process.stdout:
            process.stdout.read()
    process.wait()


def finish(process: subprocess.Popen[bytes]) -> list[StageCost] | None:
    """Wait for the costs, with one actor each. None: the timing failed, or no image was good."""
    assert process.stdout is not None
    try:
        process.wait(WAIT_AT_MOST_S)
        costs = [StageCost(**cost) for cost in json.loads(process.stdout.read() or b"[]")]
    except (subprocess.TimeoutExpired, ValueError, TypeError):
        return None
    finally:
        _kill(process)
    return costs or None


def time_stages(probe: Probe) -> list[StageCost]:
    """Measure the costs per image of one actor, without Ray. Empty: no image was good.

    A step that would run on a GPU is left out: the number of GPUs decides its actors, and its cost
    on a CPU says nothing.
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
    # The first image includes the loading of libraries and new memory, so it does not count.
    block, _ = preprocess_shard(probe.rows.slice(0, 1), first.pixels, reader=reader)
    for store in then.values():
        store(block)
    spent = dict.fromkeys(waits_s, (0.0, 0.0))
    images = made_bytes = 0
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
        made_bytes += block.nbytes
        images += rows.num_rows - block.column("image").null_count
        if time.perf_counter() - begun > ENOUGH_S:
            break
    if not images:
        return []
    costs = [
        StageCost(
            name=name,
            actors=1,
            busy_s=busy_s / images + waits_s[name],
            cpu_s=cpu_s / images,
            out_bytes=made_bytes / images if name == first.name else 0.0,
        )
        for name, (busy_s, cpu_s) in spent.items()
    ]
    if then and probe.stored:
        costs.append(_time_stored(probe.folder, first.pixels, reader))
    return costs


def _time_stored(folder: Location, pixels: Preprocessing, reader: Reader) -> StageCost:
    rows = make_work(list_images(str(folder)), rows_per_shard=IMAGES)
    for _ in range(2):  # the first time fills the reader's caches
        times = _now()
        preprocess_shard(rows, pixels, reader=reader)
        busy_s, cpu_s = _add((0.0, 0.0), times)
    images = rows.num_rows
    return StageCost(name="stored", actors=1, busy_s=busy_s / images, cpu_s=cpu_s / images)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tidy(probe: Probe) -> None:
    """Delete what the probe stored, and the folders that are empty then."""
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
    """Seconds of the clock, less the waiting for a core, which is other programs'; and of CPU."""
    waited_s = core_wait_s(threading.get_native_id()) or 0.0
    return time.perf_counter() - waited_s, time.process_time()


def _add(spent: tuple[float, float], since: tuple[float, float]) -> tuple[float, float]:
    wall_s, cpu_s = (now - then for now, then in zip(_now(), since, strict=True))
    return spent[0] + wall_s, spent[1] + cpu_s


def main(stdin: BinaryIO) -> None:
    """Read a Probe from `stdin`, and print the costs as JSON."""
    probe = pickle.load(stdin)
    try:
        costs = time_stages(probe)
    finally:
        if probe.then is not None:
            _tidy(probe)
    names = ("name", "actors", "busy_s", "cpu_s", "out_bytes")
    print(json.dumps([{name: getattr(cost, name) for name in names} for cost in costs]))


if __name__ == "__main__":
    main(sys.stdin.buffer)
