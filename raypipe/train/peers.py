"""The workers of a training, in step with each other."""

import pickle
import time
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_POLL_S = (0.0001, 0.005)
"""Pauses while a rank waits for others: a tenth of the wait so far, within these bounds."""


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same and can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Peers:
    """The workers of the run.

    Small messages go over gloo, even if gradients go over NCCL: then no GPU waits for them.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        group = dist.new_group(backend="gloo") if size > 1 else None
        self._group = cast("dist.ProcessGroup | None", group)
        self._left = False

    def leave(self) -> None:
        """Wait for nobody any more: what waits in another thread raises."""
        self._left = True

    def gather(self, *numbers: int) -> np.ndarray:
        """Exchange numbers: every rank gets those of all, int64 (size, len(numbers))."""
        return self._gathered(torch.tensor(numbers, dtype=torch.int64)).numpy()

    def exchange(self, item: T) -> list[T]:
        """Send an item to every rank: each gets the items of all, by rank."""
        if self._group is None:
            return [item]
        data = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        lengths = self.gather(len(data))[:, 0]
        # All ranks send as many bytes.
        sent = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        sent[: len(data)] = data
        received = self._gathered(sent).numpy()
        return [
            pickle.loads(of[:length].tobytes())
            for of, length in zip(received, lengths, strict=True)
        ]

    def _gathered(self, mine: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape, by rank.

        Waits in Python, so that Ctrl-C comes through and a process with such a thread can end.
        """
        if self._group is None:
            return mine[None]
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(all_, mine, group=self._group, async_op=True)
        began, (least, most) = time.perf_counter(), _POLL_S
        while not work.is_completed():
            if self._left:
                raise RuntimeError("this rank waits for the others no more")
            time.sleep(min(max(0.1 * (time.perf_counter() - began), least), most))
        work.wait()  # raises what went wrong
        return torch.stack(all_)

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. What it raises there is raised by all."""
        made: T | BaseException | None = None
        if self.rank == 0:
            try:
                made = make()
            except BaseException as error:
                if self._group is not None:
                    self.exchange(_portable(error))
                raise
        first = self.exchange(made)[0]
        if isinstance(first, BaseException):
            raise first
        return cast("T", first)

    def collect(self, item: T) -> list[T]:
        """Send an item to rank 0, which gets all items by rank. The others get an empty list."""
        if self._group is None:
            return [item]
        items: list[T] = [item] * self.size if self.rank == 0 else []
        dist.gather_object(item, items or None, dst=0, group=self._group)
        return items

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values of `tensors` to every rank, in place."""
        if self._group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)
