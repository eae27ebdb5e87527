"""The actors that do the work, one file a stage. Ray Data makes them; each call gets one shard."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raypipe.data.sinks import Sink


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """Totals and the peak of an actor's GPU since the start, other processes on it included."""

    seen_s: float = 0.0  # looked at for so long; 0: never
    busy_s: float = 0.0  # of these, a kernel ran
    memory_peak_bytes: int | None = None

    @property
    def percent(self) -> float | None:
        """Mean share of the time in which a kernel ran, 0 to 100."""
        return 100 * self.busy_s / self.seen_s if self.seen_s else None


class Gpu(Protocol):
    """What an actor computes on. `raypipe.stages.gpu.GpuMeter` is the real one; this file has no torch."""

    def use(self) -> GpuUse:
        """What was seen so far."""


class Meter(Protocol):
    """What a stage tells of its own work. `raypipe.run.meter.Meter` is the one that a run uses."""

    def start(self, gpu: Gpu | None = None) -> None:
        """The actor is ready; what it used to get there is start-up, not work."""

    def call(self) -> AbstractContextManager[None]:
        """Around the work on one shard, or one step of an actor that takes its input by itself."""

    def wait(self) -> AbstractContextManager[None]:
        """Around an actor's waiting for input that it takes by itself."""

    def count(self, *, images: int, bytes_in: int, bytes_out: int) -> None:
        """What the call did: rows accounted for, bytes taken and given."""


@dataclass(frozen=True, kw_only=True)
class After:
    """The stage after preprocess, as data: it takes one block of pixels (schema BLOCK) at a time and stores what it makes of it.

    `actor` is a class, made with `sink`, `threads`, `wait_ms`, `meter` and `arguments`, and with `device="cuda"` where it holds a GPU. Called with
    a block, it stores its results under the sink, then puts the journal's entry, and answers with what it did (schema DONE).
    """

    name: str  # in reports, and for `raypipe scale`
    noun: str  # its actors; and, after --, the option that says how many
    doing: str  # what they do, for the line that opens a run
    actor: type
    sink: Sink
    arguments: Mapping[str, Any]
    actors: int | Literal["auto"]
    libraries: str  # the backend whose libraries it imports
    share: float  # of the cores, in actors, where nothing is known of its costs
    in_flight: int  # blocks that an actor holds, the one at work included
    gpu: bool | None = False  # each actor holds one; None: where there are enough
