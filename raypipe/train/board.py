"""What the processes of Ray Train load of raypipe: its controller, its dataset manager, and the board beside them.

Only the workers need torch. Loading it and torchvision takes 5 s of CPU (2 cores of a Xeon, torch 2.15), so none of these may: what a worker is to do is handed on
by reference, and read by the worker.
"""

from dataclasses import dataclass
from typing import Any

import ray
import ray.train


class Board:
    """Where workers say how it goes, and the driver looks. An actor without a CPU of its own."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def tell(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def since(self, count: int) -> list[dict[str, Any]]:
        """All records after the first `count`."""
        return self._records[count:]


@dataclass(frozen=True)
class ToBoard:
    """A worker's end of it (train.worker.Tell)."""

    board: ray.actor.ActorHandle

    def tell(self, record: dict[str, Any]) -> None:
        self.board.tell.remote(record)


class Uneven(ray.train.DataConfig):
    """Hands each block to the worker with the fewest rows so far. Ray Train's own way would drop rows to make the numbers equal."""

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        splits = {
            name: dataset.streaming_split(world_size, equal=False)
            for name, dataset in datasets.items()
        }
        return [{name: parts[rank] for name, parts in splits.items()} for rank in range(world_size)]


def train(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker; `config["assignment"]` refers to an Assignment."""
    from raypipe.train.worker import work

    work(ray.get(config["assignment"]))
