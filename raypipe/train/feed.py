"""Batches prepared ahead on the device, in a thread, while the model trains on the one before."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

import torch

from raypipe.data.batches import Batch
from raypipe.models.placer import Placed

PREFETCHED = 2
"""Batches that wait on the device, beside the one in training."""


class Feed:
    """Prepares items ahead in a thread; what goes wrong there is raised here."""

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
                torch.cuda.set_device(
                    device
                )  # which is of the thread: else every rank would have a context on the first GPU too
            for item in items:
                self._queue.put(prepare(item))
                if (
                    self._closed
                ):  # else it would hold batches, and the execution behind them, for ever
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def peek(self) -> Placed | None:
        """The next one, which stays the next; None at the end. Waits for it."""
        if self._next is None and not self._ended:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            self._next, self._ended = item, item is None
        return self._next

    def take(self) -> Placed:
        """The next one."""
        item = self.peek()
        assert item is not None
        self._next = None
        return item

    def close(self) -> None:
        """End the thread, once it is done with what it prepares now."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
