"""The actors that do the work, one file a stage. Ray Data makes them; each call gets one shard."""

from contextlib import AbstractContextManager
from typing import Protocol


class Meter(Protocol):
    """What a stage tells of its own work. `raypipe.run.meter.Meter` is the one that a run uses."""

    def start(self) -> None:
        """The actor is ready; what it used to get there is start-up, not work."""

    def call(self) -> AbstractContextManager[None]:
        """Around the work on one shard."""

    def count(self, *, images: int, bytes_in: int, bytes_out: int) -> None:
        """What the call did: rows accounted for, bytes taken and given."""
