"""What Ray Train's controller and dataset manager load of raypipe, and the board beside them.

Only the workers need torch. Loading it and torchvision takes 5 s of CPU (2 cores of a Xeon, torch
2.15), so this module must not import it. The assignment is passed by reference, and only the worker
reads it.
"""

from dataclasses import dataclass
from typing import Any

import ray
import ray.train

from raypipe.run.meter import arrived


class Board:
    """Where workers report and the driver looks. An actor without a CPU of its own."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def tell(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def since(self, count: int) -> list[dict[str, Any]]:
        """All records after the first `count`."""
        return self._records[count:]


@dataclass(frozen=True)
class ToBoard:
    """A worker's side of the board (train.plan.Tell)."""

    board: ray.actor.ActorHandle

    def tell(self, record: dict[str, Any]) -> None:
        self.board.tell.remote(record)

    def flush(self) -> None:
        arrived(self.board.__ray_ready__.remote())


class Uneven(ray.train.DataConfig):
    """Gives each block to the worker with the fewest rows so far.

    Ray Train's default would drop rows to make the numbers equal.
    """

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        splits = {
            name: dataset.streaming_split(world_size, equal=False)
            for name, dataset in datasets.items()
        }
        return [{name: parts[rank] for name, parts in splits.items()} for rank in range(world_size)]


def train(config: dict[str, Any]) -> None:
    """The function that Ray Train runs in each worker. `config` refers to an Assignment."""
    from raypipe.train.worker import work

    work(ray.get(config["assignment"]))
