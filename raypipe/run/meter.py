"""Measures what a stage uses, with psutil in its actors, and sends it to the run's collector.

Each actor sends its totals after every shard, and every second within a long one. A message costs
its sender 0.2 ms; a shard takes 100 ms or more.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator

import psutil
import ray
from ray.exceptions import RayError

from raypipe.data.reader import core_wait_s
from raypipe.insight.states import SAMPLE_EVERY_S, Sample, StepTotals
from raypipe.stages.stage import Gpu, GpuUse

ARRIVES_S = 30.0
"""How long to wait for an actor to take a message."""

PAUSE = 200
"""After a look at the private memory, the next one waits so many times as long as it took."""

SHARED_MEMORY = "/dev/shm"
"""Where Ray keeps its object store on Linux."""


class Meter:
    """Measures the actor it lives in.

    - Busy: the wall time inside calls, and the CPU time between them, in which Ray copies the block
      into the object store.
    - CPU and memory: of the whole process, threads included, from psutil. Peaks are over samples.
    - Steps: wall and CPU time inside each, so what Ray does between calls is in none.
    - Private memory: as `private_bytes`, so often that it takes half a percent of the time.
    - Waiting for a core: of the thread that makes the calls, from /proc/self/task/*/schedstat
      (Linux).

    Args:
        stage: the name of its stage.
        collector: where to send the totals; None: they are only kept.
        loops: whether the actor fetches its own input, as a training worker does. Such an actor is
            busy whenever it does not `wait`.
    """

    def __init__(self, *, stage: str, collector: ray.actor.ActorHandle | None, loops: bool = False):
        self._stage = stage
        self._collector = collector
        self._loops = loops

    def start(self, gpu: Gpu | None = None) -> None:
        self._gpu = gpu
        self._thread = threading.get_native_id()
        self._began = time.perf_counter()
        self._starved = 0.0
        self._waits_since: float | None = None
        self._process = psutil.Process()
        self._private: int | None = None
        self._private_from = -math.inf  # when to look again
        # Ray may restart the actor in a new process: its totals start again under a new name.
        self._actor = f"{ray.get_runtime_context().get_actor_id() or 'driver'}-{os.getpid()}"
        self._node = ray.get_runtime_context().get_node_id()
        self._cpu_at_start = self._cpu()
        self._calls = self._images = self._bytes_in = self._bytes_out = self._rss_peak = 0
        self._busy = 0.0
        self._core_wait: float | None = 0.0
        self._core_wait_before = core_wait_s(self._thread)
        self._steps: dict[str, StepTotals] = {}
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
            except Exception:  # the run ends, and Ray with it
                return

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count the block as one call."""
        now = time.perf_counter()
        between = min(time.process_time() - self._cpu_left, now - self._left)
        with self._lock:
            self._busy += max(between, 0.0)
            self._entered = now
        thread = threading.get_native_id()  # may differ from the one that made the actor
        waited = core_wait_s(thread)
        try:
            yield
        finally:
            now = time.perf_counter()
            in_all = core_wait_s(thread)
            with self._lock:
                self._busy += now - self._entered
                if self._core_wait is not None:
                    self._core_wait = (
                        None
                        if in_all is None or waited is None
                        else self._core_wait + in_all - waited
                    )
                self._entered = None
                self._calls += 1
            self._left, self._cpu_left = now, time.process_time()
            if self._collector is not None:
                self._send()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the block as one step of a call."""
        thread = threading.get_native_id()
        begun, cpu_s, waited = time.perf_counter(), time.process_time(), core_wait_s(thread)
        try:
            yield
        finally:
            in_all = core_wait_s(thread)
            spent = StepTotals(
                name=name,
                busy_s=time.perf_counter() - begun,
                core_wait_s=None if in_all is None or waited is None else in_all - waited,
                cpu_s=time.process_time() - cpu_s,
            )
            self._add(spent)

    def _add(self, spent: StepTotals) -> None:
        with self._lock:
            before = self._steps.get(spent.name, StepTotals(name=spent.name))
            self._steps[spent.name] = before.plus(spent)

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Count the block as waiting for input."""
        self._waits_since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._starved += time.perf_counter() - self._waits_since
                self._waits_since = None

    def _spent(self, now: float) -> tuple[float, float, float | None, float | None]:
        """Seconds busy; of these in the current call, and waiting for a core; and starved."""
        if not self._loops:
            under_way = now - self._entered if self._entered is not None else 0.0
            return self._busy + under_way, under_way, self._core_wait, None
        starved = self._starved + (
            now - self._waits_since if self._waits_since is not None else 0.0
        )
        in_all = core_wait_s(self._thread)
        waited = (
            None
            if in_all is None or self._core_wait_before is None
            else in_all - self._core_wait_before
        )
        return now - self._began - starved, 0.0, waited, starved

    def count(self, *, images: int, bytes_in: int, bytes_out: int, step: str | None = None) -> None:
        if step is not None:
            self._add(StepTotals(name=step, bytes_in=bytes_in, bytes_out=bytes_out))
            return
        with self._lock:
            self._images += images
            self._bytes_in += bytes_in
            self._bytes_out += bytes_out

    def sample(self) -> Sample:
        """The current totals."""
        machine = psutil.cpu_times()
        with self._lock:
            now = time.perf_counter()
            rss = self._process.memory_info().rss
            self._rss_peak = max(self._rss_peak, rss)
            if now >= self._private_from:
                self._private = private_bytes()
                then = time.perf_counter()
                self._private_from = then + PAUSE * (then - now)
            busy, under_way, core_wait, starved = self._spent(now)
            gpu = self._gpu.use() if self._gpu is not None else GpuUse()
            return Sample(
                stage=self._stage,
                actor=self._actor,
                node=self._node,
                at=time.time(),
                calls=self._calls,
                images=self._images,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                busy_s=busy,
                under_way_s=under_way,
                core_wait_s=core_wait,
                cpu_s=self._cpu() - self._cpu_at_start,
                rss_bytes=rss,
                rss_peak_bytes=self._rss_peak,
                node_cpu_busy_s=busy_cpu_s(machine),
                node_cpu_total_s=sum(machine[:8]),
                starved_s=starved,
                gpu_seen_s=gpu.seen_s,
                gpu_busy_s=gpu.busy_s,
                gpu_memory_peak_bytes=gpu.memory_peak_bytes,
                private_bytes=self._private,
                node_store_bytes=store_bytes(),
                steps=tuple(self._steps.values()),
            )

    def flush(self) -> None:
        if self._collector is not None:
            arrived(self._send())

    def _send(self) -> ray.ObjectRef:
        assert self._collector is not None
        self._sent = time.time()
        return self._collector.record.remote(self.sample())


def arrived(call: ray.ObjectRef) -> None:
    """Wait until an actor has done `call` and the calls before it, or is lost."""
    with contextlib.suppress(RayError):
        ray.get(call, timeout=ARRIVES_S)


def private_bytes() -> int | None:
    """Memory of this process, without what it maps of files and of Ray's object store.

    What it shares with the forks of one server, as imported modules, is divided among them. To read
    it takes the kernel 2 ms in a process of 130 MB, and 14 ms in one of 500. None: the system does
    not tell, as an older Linux.
    """
    try:
        with open("/proc/self/smaps_rollup") as lines:
            (kilobytes,) = (line.split()[1] for line in lines if line.startswith("Pss_Anon:"))
    except (OSError, ValueError):
        return None
    return 1024 * int(kilobytes)


def store_bytes() -> int | None:
    """Shared memory in use on this node, by Ray's object store and other programs."""
    try:
        return int(psutil.disk_usage(SHARED_MEMORY).used)
    except OSError:  # macOS has none: Ray's store is a file there
        return None


def busy_cpu_s(times) -> float:
    """CPU seconds of all cores, from psutil.cpu_times(). Waiting for a disk is idle."""
    return sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)
