"""The actor that does a stage's steps, its memory, and its position file, which outlives it."""

import contextlib
import ctypes
import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from raypipe.data.lease import is_alive
from raypipe.images.header import Reject
from raypipe.stages.stage import Meter, Stage, Step

ACTOR_BYTES = {"opencv": 250 * 10**6, "torchvision": 600 * 10**6}
"""Memory of an actor that has no image yet, by backend (measured: resident, libraries included)."""

TRIES = 3
"""An image during which the process died this often is taken to be the cause. A lower number would
blame images that were only in progress when a node was lost or somebody killed the actor."""


class Actor:
    """Do the steps of a stage, in a row, to one block at a time. Ray Data makes it and calls it."""

    def __init__(self, *, steps: Sequence[Step], threads: int, gpu: bool, meter: Meter):
        keep_freed_memory()
        self._doing = {step.name: step.begin(threads=threads, gpu=gpu) for step in steps}
        self._meter = meter
        doing = self._doing.values()
        meter.start(next((one.gpu for one in doing if one.gpu is not None), None))

    def __call__(self, block: pa.Table) -> pa.Table:
        images = bytes_in = bytes_out = 0
        with self._meter.call():
            for name, doing in self._doing.items():
                with self._meter.step(name):
                    done = doing(block)
                self._meter.count(
                    images=done.images,
                    bytes_in=done.bytes_in,
                    bytes_out=done.bytes_out,
                    step=name,
                )
                # Not kept: the next shard's pixels go where those of `block` are.
                block, bytes_out = done.block, done.bytes_out
                images, bytes_in = images or done.images, bytes_in or done.bytes_in
            self._meter.count(images=images, bytes_in=bytes_in, bytes_out=bytes_out)
            return block


def actor_class(stage: Stage) -> type[Actor]:
    """Make the class of a stage's actors. Ray Data and process lists show its name."""
    name = "".join(step.name.capitalize() for step in stage.steps)
    return type(name, (Actor,), {"__doc__": Actor.__doc__, "__module__": __name__})


# --- memory ----------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next image.

    Otherwise the kernel takes it back and the process faults it in again, which was a third of a
    decoding process's time (measured; see jobs/benchmarks/throughput.py). Without glibc this does
    nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory` once: return free memory to the kernel. May take milliseconds."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def new_bytes(size: int) -> np.ndarray:
    """Allocate `size` bytes (uint8, one dimension), not initialised."""
    return np.empty(size, np.uint8)


class Memory:
    """Arrays of bytes in one memory mapping, which is used again once nobody holds the last array.

    New memory is expensive for a process: 64 MiB took 10 to 150 ms here, the work on them 450 ms.
    Ray has copied a block before it asks for the next one, so an actor needs one mapping. malloc
    does not serve: Ray Data calls an actor in another thread than the one that made it, and glibc
    has an arena for each thread.
    """

    def __init__(self, size: int):
        self._take(size)

    def _take(self, size: int) -> None:
        # Private: mmap's default is shared memory, which gets no huge pages by default on Linux.
        self._bytes = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._bytes.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(self._bytes, np.uint8).fill(0)
        self._lent: weakref.ref[np.ndarray] | None = None

    def __call__(self, size: int) -> np.ndarray:
        """Return `size` bytes (uint8, one dimension), not initialised.

        They are free again when neither the array nor a view of it is left.
        """
        if self._lent is not None and self._lent() is not None:
            return new_bytes(size)
        if size > len(self._bytes):
            self._take(size)
        array = np.frombuffer(self._bytes, np.uint8, size)
        self._lent = weakref.ref(array)
        return array


# --- tracks ----------------------------------------------------------------------------------


class Tracks:
    """The row this process works on, in a file that outlives it; and the rows that ended processes.

    Python cannot catch a decoder that kills its process, and cannot stop one that never returns.
    Ray starts the actor again and repeats the task without end. So each process writes its position
    to a memory-mapped file (1 us an image), and the next process on this node counts the dead.
    A process whose image takes too long records that there, and kills itself.

    Args:
        folder: local, of one run.
        image_seconds: CPU of this process that one image may take, all threads together.
    """

    _POSITION = struct.Struct("<qq?")
    _LATE = struct.Struct("<?")

    def __init__(self, folder: str, *, image_seconds: float = math.inf):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bury()
        path = self._folder / f"{os.getpid()}-{int(psutil.Process().create_time())}.at"
        path.write_bytes(self._POSITION.pack(-1, -1, False))
        with path.open("r+b") as file:
            self._at = mmap.mmap(file.fileno(), self._POSITION.size)
        self._limit_s = image_seconds
        # The row, and the process's CPU seconds when it began.
        self._since: tuple[int, float] = (-1, 0.0)
        if math.isfinite(image_seconds):
            threading.Thread(target=self._watch, name="raypipe-image-seconds", daemon=True).start()

    def _bury(self) -> None:
        for path in self._folder.glob("*.at"):
            pid, created = map(int, path.stem.split("-"))
            if is_alive(pid, created):
                continue
            # FileNotFoundError: another actor was faster.
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_suffix(".dead"))

    def killers(self, shard: int) -> dict[int, Reject]:
        """Return the rows of `shard` that ended processes, and why they are rejected.

        Only deaths that actors found at their start count: the successor of a dead actor repeats
        its task. Looking again at each shard would cost 0.1 ms for each actor of the node.
        """
        deaths: Counter[int] = Counter()
        late: set[int] = set()
        for grave in self._folder.glob("*.dead"):
            at, row, took_too_long = self._POSITION.unpack(grave.read_bytes())
            if at == shard:
                deaths[row] += 1
                late |= {row} if took_too_long else set()
        killing = Reject(
            "kills its process", f"the preprocess actor died {TRIES} times while at this image"
        )
        slow = Reject("takes too long", f"more than --image-seconds {self._limit_s:g} of CPU")
        return {
            row: slow if row in late else killing
            for row, count in deaths.items()
            if count >= TRIES or row in late
        }

    def mark(self, shard: int, row: int) -> None:
        """Record that this process is now at `row` of `shard`; -1, -1: at none."""
        self._POSITION.pack_into(self._at, 0, shard, row, False)
        self._since = row, time.process_time()

    def _watch(self) -> None:
        """Kill the process when an image takes too long. Decoders release the GIL, so this runs."""
        while True:
            time.sleep(min(self._limit_s / 4, 1.0))
            row, begun = since = self._since
            if row >= 0 and time.process_time() - begun > self._limit_s and self._since is since:
                self._LATE.pack_into(self._at, self._POSITION.size - self._LATE.size, True)
                os.kill(os.getpid(), signal.SIGKILL)
