"""Steps and stages as data, and what a meter and a GPU look like to them. Nothing of Ray, nothing of torch.

A **step** is what is done to a block: preprocess, write, predict. It is a frozen dataclass that an actor begins, which
gives what the actor calls with blocks. A **stage** is a pool of actors that do one or more steps in a row. A pipeline
is a tuple of stages.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import pyarrow as pa

Count = int | Literal["auto"]
"""How many actors a stage gets; auto: as the planner finds best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """Totals and the peak of an actor's GPU since its start, other processes on it included."""

    seen_s: float = 0.0  # looked at for so long; 0: never
    busy_s: float = 0.0  # of these, a kernel ran
    memory_peak_bytes: int | None = None

    @property
    def percent(self) -> float | None:
        """Mean share of the time in which a kernel ran, 0 to 100."""
        return 100 * self.busy_s / self.seen_s if self.seen_s else None


class Gpu(Protocol):
    """What an actor computes on. `raypipe.stages.gpu.GpuMeter` is the real one."""

    def use(self) -> GpuUse:
        """What was seen so far."""


class Meter(Protocol):
    """What measures an actor. `raypipe.run.meter.Meter` is the one that a run uses."""

    def start(self, gpu: Gpu | None = None) -> None:
        """The actor is ready; what it used to get there is start-up, not work."""

    def call(self) -> AbstractContextManager[None]:
        """Around the work on one shard, or one step of an actor that takes its input by itself."""

    def wait(self) -> AbstractContextManager[None]:
        """Around an actor's waiting for input that it takes by itself."""

    def count(self, *, images: int, bytes_in: int, bytes_out: int) -> None:
        """What the call did: rows accounted for, bytes taken and given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What a call of a step made: the next block; and for the meter rows accounted for, bytes taken and bytes given."""

    block: pa.Table
    images: int
    bytes_in: int
    bytes_out: int


class Doing(Protocol):
    """A step that has begun."""

    @property
    def gpu(self) -> Gpu | None:
        """What it computes on; None: the CPU."""

    def __call__(self, block: pa.Table) -> Done:
        """Do the step to one block."""


class Step(Protocol):
    """What is done to a block, as data."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def libraries(self) -> str:
        """The backend whose libraries it imports."""

    def begin(self, *, threads: int, gpu: bool) -> Doing:
        """Load what the step needs, in the process that will do it.

        Args:
            threads: that OpenCV or torch may use.
            gpu: whether the process holds a GPU.
        """


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pool of actors, each of which does `steps` in a row to one block at a time."""

    steps: tuple[Step, ...]
    actors: Count
    noun: str  # for its actors, in messages
    option: str  # the flag that says how many
    doing: str  # what they do, for the line that opens a run
    in_flight: int  # blocks that an actor holds, the one at work included
    share: float = 1.0  # of the cores, in actors, where nothing is known of its costs
    gpu: bool | None = False  # each actor holds one; None: where there are enough

    @property
    def name(self) -> str:
        """Name in reports, and for `raypipe scale`."""
        return "+".join(step.name for step in self.steps)

    @property
    def libraries(self) -> tuple[str, ...]:
        """The backends whose libraries its actors import."""
        return tuple(dict.fromkeys(step.libraries for step in self.steps))


def auto_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The stages whose actor count is left to the planner."""
    return tuple(stage.name for stage in stages if stage.actors == "auto")
