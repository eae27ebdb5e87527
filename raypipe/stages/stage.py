"""Steps and stages as data, and what a meter and a GPU look like to them. Imports no Ray, no torch.

A **step** is what is done to a block: preprocess, write, predict. It is a frozen dataclass. An
actor begins it, and then calls the result with blocks. A **stage** is a pool of actors that do one
or more steps in a row. A pipeline is a tuple of stages.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import pyarrow as pa

Count = int | Literal["auto"]
"""How many actors a stage gets; auto: as many as the planner finds best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """Totals and peak of an actor's GPU since the actor's start, other processes on it included.

    seen_s: seconds of observation; 0: never observed.
    busy_s: of these, seconds in which a kernel ran.
    """

    seen_s: float = 0.0
    busy_s: float = 0.0
    memory_peak_bytes: int | None = None

    @property
    def percent(self) -> float | None:
        """Mean share of the time in which a kernel ran, 0 to 100."""
        return 100 * self.busy_s / self.seen_s if self.seen_s else None


class Gpu(Protocol):
    """The device that an actor computes on. `raypipe.stages.gpu.GpuMeter` implements it."""

    def use(self) -> GpuUse:
        """The totals so far."""


class Meter(Protocol):
    """Measures an actor. `raypipe.run.meter.Meter` is the one that a run uses."""

    def start(self, gpu: Gpu | None = None) -> None:
        """Count from now on: the actor is ready, and what it used so far is start-up, not work."""

    def call(self) -> AbstractContextManager[None]:
        """Time the work on one shard, or one step of an actor that fetches its own input."""

    def wait(self) -> AbstractContextManager[None]:
        """Time the waiting of an actor that fetches its own input."""

    def count(self, *, images: int, bytes_in: int, bytes_out: int) -> None:
        """Add what the call did: rows accounted for, bytes in and out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What one call of a step made: the next block; and rows and bytes, for the meter."""

    block: pa.Table
    images: int
    bytes_in: int
    bytes_out: int


class Doing(Protocol):
    """A step that has begun."""

    @property
    def gpu(self) -> Gpu | None:
        """The device it computes on; None: the CPU."""

    def __call__(self, block: pa.Table) -> Done:
        """Do the step to one block."""


class Step(Protocol):
    """What is done to a block, as data."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def libraries(self) -> str:
        """The backend whose libraries the step imports."""

    @property
    def memory(self) -> int:
        """Bytes that its images may take in an actor, where that is bounded; else 0."""

    def begin(self, *, threads: int, gpu: bool) -> Doing:
        """Load what the step needs, in the process that will do it.

        Args:
            threads: how many OpenCV or torch may use.
            gpu: whether the process holds a GPU.
        """


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pool of actors, each of which does `steps` in a row to one block at a time.

    noun: for its actors, in messages.
    option: the flag that sets their number.
    doing: what they do, for the opening line of a run.
    in_flight: blocks that an actor holds, the one at work included.
    share: actors per core, where the costs are unknown.
    gpu: whether each actor holds a GPU; None: if there are enough.
    """

    steps: tuple[Step, ...]
    actors: Count
    noun: str
    option: str
    doing: str
    in_flight: int
    share: float = 1.0
    gpu: bool | None = False

    @property
    def name(self) -> str:
        """Name in reports, and for `raypipe scale`."""
        return "+".join(step.name for step in self.steps)

    @property
    def libraries(self) -> tuple[str, ...]:
        """The backends whose libraries the actors import."""
        return tuple(dict.fromkeys(step.libraries for step in self.steps))

    @property
    def memory(self) -> int:
        """Bytes that images may take in one of its actors."""
        return max(step.memory for step in self.steps)


def auto_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Names of the stages whose actor count the planner chooses."""
    return tuple(stage.name for stage in stages if stage.actors == "auto")
