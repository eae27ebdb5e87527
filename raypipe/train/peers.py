"""The workers of a training, in step with each other."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """The workers of the run. Small things go over gloo, also where gradients go over NCCL: then no GPU waits for them."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._group: Any = dist.new_group(backend="gloo") if size > 1 else None

    def gather(self, *numbers: int) -> np.ndarray:
        """Everybody's numbers, int64 (size, len(numbers)), to everybody."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        if self._group is None:
            return mine.numpy()[None]
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_, mine, group=self._group)
        return torch.stack(all_).numpy()

    def collect(self, item: Any) -> list[Any]:
        """Everybody's item, by rank, to rank 0; an empty list to the others."""
        if self._group is None:
            return [item]
        items = [None] * self.size if self.rank == 0 else None
        dist.gather_object(item, items, dst=0, group=self._group)
        return items or []

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give everybody rank 0's values of `tensors`, in place."""
        if self._group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)
