"""What a stage used: measured in its actors with psutil, sent to the run's collector.

Each actor sends its running totals after every shard, and within a long one every second. A message costs its sender 0.2 ms, a shard 100 ms
or more.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

SAMPLE_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Running totals of one actor process since it was ready."""

    stage: str
    actor: str  # of this process: a restarted actor is another one
    node: str
    at: float  # time.time()
    calls: int
    images: int
    bytes_in: int
    bytes_out: int
    busy_s: float
    under_way_s: float  # of busy_s, in a call that is not finished: its images are not counted yet
    core_wait_s: float | None  # of busy_s, ready to run and waiting for a core; None where the system does not tell
    cpu_s: float
    rss_bytes: int
    rss_peak_bytes: int
    node_cpu_busy_s: float
    node_cpu_total_s: float


class Meter:
    """Measures the actor it lives in and sends what it finds to `collector` (None: keeps it to itself).

    Busy is the wall time inside calls, and the CPU time between them: there Ray copies the block into the object store. CPU and
    resident memory are the whole process's, threads included, from psutil; the peak is over samples, not between them. Waiting for a
    core is that of the thread that makes the calls, from Linux's /proc/self/task/*/schedstat.
    """

    def __init__(self, *, stage: str, collector: ray.actor.ActorHandle | None):
        self._stage = stage
        self._collector = collector

    def start(self) -> None:
        self._process = psutil.Process()
        # Ray may restart the actor in a new process: totals then start again under a new name.
        self._actor = f"{ray.get_runtime_context().get_actor_id() or 'driver'}-{os.getpid()}"
        self._node = ray.get_runtime_context().get_node_id()
        self._cpu_at_start = self._cpu()
        self._calls = self._images = self._bytes_in = self._bytes_out = self._rss_peak = 0
        self._busy = 0.0
        self._core_wait: float | None = 0.0
        self._entered: float | None = None
        self._left = time.perf_counter()
        self._cpu_left = time.process_time()
        self._lock = threading.Lock()
        if self._collector is not None:
            self._send()
            threading.Thread(target=self._sample, daemon=True, name="raypipe-meter").start()

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _sample(self) -> None:
        while True:
            time.sleep(SAMPLE_EVERY_S)
            try:
                if time.time() - self._sent >= SAMPLE_EVERY_S:
                    self._send()
            except Exception:  # the run is ending and Ray with it; nobody is left to tell
                return

    @contextmanager
    def call(self) -> Iterator[None]:
        now = time.perf_counter()
        between = min(time.process_time() - self._cpu_left, now - self._left)
        with self._lock:
            self._busy += max(between, 0.0)
            self._entered = now
        waited = _core_wait_s()
        try:
            yield
        finally:
            now = time.perf_counter()
            in_all = _core_wait_s()
            with self._lock:
                self._busy += now - self._entered
                if self._core_wait is not None:
                    self._core_wait = None if in_all is None or waited is None else self._core_wait + in_all - waited
                self._entered = None
                self._calls += 1
            self._left, self._cpu_left = now, time.process_time()
            if self._collector is not None:
                self._send()

    def count(self, *, images: int, bytes_in: int, bytes_out: int) -> None:
        with self._lock:
            self._images += images
            self._bytes_in += bytes_in
            self._bytes_out += bytes_out

    def sample(self) -> Sample:
        """The totals as they stand."""
        machine = psutil.cpu_times()
        with self._lock:
            rss = self._process.memory_info().rss
            self._rss_peak = max(self._rss_peak, rss)
            under_way = time.perf_counter() - self._entered if self._entered is not None else 0.0
            return Sample(
                stage=self._stage,
                actor=self._actor,
                node=self._node,
                at=time.time(),
                calls=self._calls,
                images=self._images,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                busy_s=self._busy + under_way,
                under_way_s=under_way,
                core_wait_s=self._core_wait,
                cpu_s=self._cpu() - self._cpu_at_start,
                rss_bytes=rss,
                rss_peak_bytes=self._rss_peak,
                node_cpu_busy_s=busy_cpu_s(machine),
                node_cpu_total_s=sum(machine[:8]),
            )

    def _send(self) -> None:
        assert self._collector is not None
        self._sent = time.time()
        self._collector.record.remote(self.sample())


def _core_wait_s() -> float | None:
    """Seconds that this thread has been ready to run and had no core (the second figure of its schedstat, nanoseconds)."""
    try:
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def busy_cpu_s(times) -> float:
    """CPU seconds of the machine, all cores, not idle, from psutil.cpu_times(). Waiting for a disk is idle."""
    return sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)
