"""The schedule of the learning rate, and where a worker's time goes."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch


def lr_factor(done: float, *, schedule: str, warmup: float) -> float:
    """The factor of the learning rate when the share `done` (0 to 1) of all rows is done.

    A function of rows, not of steps: it does not change with the number of workers, or by a resume.
    Linear warm-up over the share `warmup`. Then "cosine" to 0, or "step": a tenth from 2/3 on, a
    hundredth from 8/9 on (as SSD in torchvision and MLPerf).
    """
    if done < warmup:
        return max(done / warmup, 1e-3)
    if schedule == "step":
        return 0.1 ** ((done >= 2 / 3) + (done >= 8 / 9))
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


class Clock:
    """Where a worker's time goes, in seconds.

    Steps on a GPU are timed by events on its stream, so nothing waits for them.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Count from now on; the time before is start-up."""
        self.began = time.time()
        self._started = time.perf_counter()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds = dict.fromkeys(("wait", "step", "evaluate", "checkpoint"), 0.0)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Time what happens inside, as `what`."""
        if self._cuda and what == "step":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        begun = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """The seconds since the start: by what they were spent on, and in all ("wall")."""
        waiting = []
        for begin, end in self._events:
            if end.query():
                self.seconds["step"] += begin.elapsed_time(end) / 1000
            else:
                waiting.append((begin, end))
        self._events = waiting
        return {**self.seconds, "wall": time.perf_counter() - self._started}
