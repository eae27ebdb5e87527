"""Batches that a thread prepares on the device while the model trains on the one before."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

import torch

from raypipe.data.batches import Batch
from raypipe.models.placer import Placed

PREFETCHED = 2
"""Batches that wait on the device, in addition to the one in training."""


class Feed:
    """Prepares items ahead in a thread. Its errors are raised by `peek` and `take`."""

    def __init__(
        self, items: Iterator[Batch], prepare: Callable[[Batch], Placed], device: torch.device
    ):
        self._queue: queue.Queue[Placed | BaseException | None] = queue.Queue(PREFETCHED)
        self._next: Placed | None = None
        self._ended = self._closed = False
        self._thread = threading.Thread(
            target=self._fill, args=(items, prepare, device), daemon=True, name="raypipe-feed"
        )
        self._thread.start()

    def _fill(
        self, items: Iterator[Batch], prepare: Callable[[Batch], Placed], device: torch.device
    ) -> None:
        try:
            if device.type == "cuda":
                # Per thread: otherwise every rank would have a context on the first GPU too.
                torch.cuda.set_device(device)
            for item in items:
                self._queue.put(prepare(item))
                # Otherwise the thread would hold batches, and the execution behind them, for ever.
                if self._closed:
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def peek(self) -> Placed | None:
        """Wait for the next item and return it, without taking it. None: there is no more."""
        if self._next is None and not self._ended:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            self._next, self._ended = item, item is None
        return self._next

    def take(self) -> Placed:
        """Take the next item."""
        item = self.peek()
        assert item is not None
        self._next = None
        return item

    def close(self) -> None:
        """End the thread after the item that it prepares now."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
