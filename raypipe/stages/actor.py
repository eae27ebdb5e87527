"""What outlives an actor: which image it was at when it died."""

import contextlib
import math
import mmap
import os
import signal
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from raypipe.data.lease import is_alive
from raypipe.images.decode import Reject

ACTOR_BYTES = {"opencv": 250 * 10**6, "torchvision": 600 * 10**6}
"""Memory that an actor has before it has an image (measured: resident, libraries included)."""

TRIES = 3
"""An image during which the process died this often is taken to be the cause. A lower number would
blame images that were only under way when a node was lost or somebody killed the actor."""


class Tracks:
    """Which row this process is at, in a file that outlives it; and which rows ended processes.

    Nothing can be caught when a decoder kills its process, and nothing stops one that computes for
    ever. Ray starts the actor again and repeats the task, for ever; so each process leaves its
    position in a memory-mapped file (1 us an image), and the next one on this node counts the dead.
    A process whose image takes too long says so there, and kills itself.

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
        self._since: tuple[int, float] = (
            -1,
            0.0,
        )  # the row, and the process's CPU seconds when it began
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
        """The rows of `shard` that ended processes, and why they are rejected, as far as actors that started since have found.

        Looking for the dead again at each shard would cost 0.1 ms for each actor of the node; the task of one that died is
        repeated by the one that takes its place.
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
        """This process is now at `row` of `shard`; -1, -1: at none."""
        self._POSITION.pack_into(self._at, 0, shard, row, False)
        self._since = row, time.process_time()

    def _watch(self) -> None:
        """Ends the process when an image takes too long: decoders let other threads run meanwhile."""
        while True:
            time.sleep(min(self._limit_s / 4, 1.0))
            row, begun = since = self._since
            if row >= 0 and time.process_time() - begun > self._limit_s and self._since is since:
                self._LATE.pack_into(self._at, self._POSITION.size - self._LATE.size, True)
                os.kill(os.getpid(), signal.SIGKILL)
