"""The workers of a training, in step with each other."""

import pickle
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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

    def gather(self, *numbers: int) -> np.ndarray:
        """Exchange numbers: every rank gets those of all, int64 (size, len(numbers))."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        if self._group is None:
            return mine.numpy()[None]
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_, mine, group=self._group)
        return torch.stack(all_).numpy()

    def exchange(self, item: T) -> list[T]:
        """Send an item to every rank: each gets the items of all, by rank."""
        if self._group is None:
            return [item]
        items: list[T] = [item] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. What it raises there is raised by all."""
        if self._group is None:
            return make()
        made: list[T | BaseException | None] = [None]
        if self.rank == 0:
            try:
                made = [make()]
            except BaseException as error:
                dist.broadcast_object_list([_portable(error)], src=0, group=self._group)
                raise
        dist.broadcast_object_list(made, src=0, group=self._group)
        if isinstance(made[0], BaseException):
            raise made[0]
        return cast("T", made[0])

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
