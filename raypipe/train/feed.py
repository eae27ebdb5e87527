"""Items that a thread prepares ahead, while the loop works on the one before."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

PREFETCHED = 2
"""Items that wait prepared, in addition to the one at work."""


class Feed(Generic[T, U]):
    """Prepares items ahead in a thread. Its errors are raised by `peek` and `take`."""

    def __init__(
        self,
        items: Iterator[T],
        prepare: Callable[[T], U],
        device: torch.device,
        *,
        prefetched: int = PREFETCHED,
    ):
        self._ready: deque[U | BaseException | None] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._most = prefetched
        self._thread = threading.Thread(
            target=self._fill, args=(items, prepare, device), daemon=True, name="raypipe-feed"
        )
        self._thread.start()

    def _fill(self, items: Iterator[T], prepare: Callable[[T], U], device: torch.device) -> None:
        try:
            if device.type == "cuda":
                # Per thread: otherwise every rank would have a context on the first GPU too.
                torch.cuda.set_device(device)
            for item in items:
                if not self._put(prepare(item)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: U | BaseException | None) -> bool:
        """Put an item when there is room. Whether somebody still wants it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._most)
            if not self._closed:
                self._ready.append(item)
            self._changed.notify_all()
            return not self._closed

    def peek(self) -> U | None:
        """Wait for the next item and return it, without taking it. None: there is no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready[0]
        if isinstance(item, BaseException):
            raise item
        return item

    def take(self) -> U:
        """Take the next item."""
        item = self.peek()
        assert item is not None
        with self._changed:
            self._ready.popleft()
            self._changed.notify_all()
        return item

    def close(self, *, wait_s: float = 0.0) -> None:
        """End the thread after the item that it prepares now.

        Args:
            wait_s: for its end, at most.
        """
        with self._changed:
            self._closed = True
            # Otherwise it would hold items, and the execution behind them, for ever.
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(wait_s)
