"""Steps and stages as data, and what a meter and a GPU look like to them. Imports no Ray, no torch.

A **step** is what is done to a block: preprocess, write, predict. It is a frozen dataclass. An
actor begins it, and then calls the result with blocks. A **stage** is a pool of actors that do one
or more steps in a row. A pipeline is a tuple of stages.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
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

    def step(self, name: str) -> AbstractContextManager[None]:
        """Time one step of a call."""

    def wait(self) -> AbstractContextManager[None]:
        """Time the waiting of an actor that fetches its own input."""

    def count(self, *, images: int, bytes_in: int, bytes_out: int, step: str | None = None) -> None:
        """Add what the call did, or one of its steps: rows accounted for, bytes in and out."""

    def flush(self) -> None:
        """Send the totals, and return when they have arrived: the process may end at any time."""


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
        """Bytes that its images may take in an actor, beside those of other steps; 0: few."""

    @property
    def wait_ms(self) -> float:
        """Milliseconds to add to each image."""

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
    joins: whether the actors of the stage before may do its steps: 0 actors ask for that, and
        auto may choose it.
    """

    steps: tuple[Step, ...]
    actors: Count
    noun: str
    option: str
    doing: str
    in_flight: int
    share: float = 1.0
    gpu: bool | None = False
    joins: bool = False

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
        return sum(step.memory for step in self.steps)


def fused(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The pipeline in which the actors of the last stage but one do the steps of the last too."""
    *before, first, last = stages
    doing = f"{first.doing} and {last.doing}"
    return (*before, replace(first, steps=first.steps + last.steps, doing=doing))


def forms(stages: Sequence[Stage]) -> tuple[tuple[Stage, ...], ...]:
    """The pipelines that may do the steps of `stages`: one, or fused and separate."""
    separate = tuple(stages)
    if not separate[-1].joins or len(separate) < 2:
        return (separate,)
    actors = separate[-1].actors
    if actors == 0:
        return (fused(separate),)
    return (fused(separate), separate) if actors == "auto" else (separate,)


def auto_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Names of the stages whose actor count the planner chooses."""
    return tuple(stage.name for stage in stages if stage.actors == "auto")
