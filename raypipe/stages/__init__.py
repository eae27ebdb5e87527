"""The actors that do the work, one file a stage. Ray Data makes them; each call gets one shard."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


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
