"""Files of one shard, put at once where each would wait for a store."""

import functools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from raypipe.data.location import Location

AT_ONCE = 64
"""Objects that one process puts at the same time: 2,000 objects/s at 30 ms each."""

HELD_BYTES = 32 << 20
"""Bytes of one shard that wait for the store at the same time, besides one file."""


@functools.cache
def _threads() -> ThreadPoolExecutor:
    # It starts a thread only when no other one is idle: a fast store needs few.
    return ThreadPoolExecutor(AT_ONCE, "raypipe-put")


class Puts:
    """Puts files below a folder. In a store they overlap, and the block waits for all of them.

    `with Puts(root) as puts:` raises the first failure, as `Location.write` does, when the next
    file is put or at the end. Then files that were put stay, and none is put any more.
    """

    def __init__(self, root: Location) -> None:
        self._root = root
        self._flying: deque[tuple[int, Future[None]]] = deque()
        self._held = 0

    def put(self, relative: str, data: bytes | memoryview) -> None:
        """Put `data` at `relative` below the folder, whole or not at all. May return before."""
        if not self._root.is_remote:
            self._root.write(relative, data)
            return
        size = len(data)
        while self._flying and (len(self._flying) >= AT_ONCE or self._held + size > HELD_BYTES):
            self._settle()
        self._flying.append((size, _threads().submit(self._root.write, relative, data)))
        self._held += size

    def _settle(self) -> None:
        size, future = self._flying.popleft()
        self._held -= size
        future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            while self._flying and raised[0] is None:
                self._settle()
        finally:
            left = [future for _, future in self._flying if not future.cancel()]
            for future in left:  # no put of a shard that failed may come later
                future.exception()
