"""What a stage used: measured in its actors with psutil, collected in one named actor.

Each actor sends its running totals after every shard, and within a long one every second; the collector keeps each actor's latest totals
(so a lost or repeated message changes nothing) and a timeline. A message costs its sender 0.2 ms, a shard 100 ms or more.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import psutil
import ray

from raypipe.insight.report import PoolView

NAMESPACE = "raypipe"

SAMPLE_EVERY_S = 1.0

TIMELINE_BUCKETS = 3600
"""A timeline that grows longer has its buckets joined in pairs: an hour at a second each, a day at 32 s."""


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
    cpu_s: float
    rss_bytes: int
    rss_peak_bytes: int
    node_cpu_busy_s: float
    node_cpu_total_s: float


class Meter:
    """Measures the actor it lives in and sends what it finds to `collector` (None: keeps it to itself).

    Busy is the wall time inside calls, and the CPU time between them: there Ray copies the block into the object store. CPU and
    resident memory are the whole process's, threads included, from psutil; the peak is over samples, not between them.
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
        try:
            yield
        finally:
            now = time.perf_counter()
            with self._lock:
                self._busy += now - self._entered
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


def busy_cpu_s(times) -> float:
    """CPU seconds of the machine, all cores, not idle, from psutil.cpu_times(). Waiting for a disk is idle."""
    return sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)


@dataclass(slots=True)
class _Bucket:
    """What one stage did in one stretch of the timeline."""

    images: float = 0.0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    rss_bytes: dict[str, int] = field(default_factory=dict)
    actors: int | None = None
    queued: int | None = None
    actor_s: float = 0.0
    starved_s: float = 0.0

    def add(self, other: "_Bucket") -> None:
        """Take in the stretch that follows."""
        self.images += other.images
        self.busy_s += other.busy_s
        self.cpu_s += other.cpu_s
        self.rss_bytes |= other.rss_bytes
        self.actors = self.actors if other.actors is None else other.actors
        self.queued = self.queued if other.queued is None else other.queued
        self.actor_s += other.actor_s
        self.starved_s += other.starved_s

    def record(self, width: float) -> dict[str, float | int | None]:
        """As plain figures, for a stretch of `width` seconds. What no actor, or no look at the execution, told of it is None."""
        told = bool(self.rss_bytes)
        busy = min(self.busy_s / self.actor_s, 1.0) if self.actor_s and told else None
        starved = None if busy is None else min(self.starved_s / self.actor_s, 1.0 - busy)
        return {
            "actors": self.actors,
            "images_per_s": self.images / width if told else None,
            "cpu_cores": self.cpu_s / width if told else None,
            "rss_bytes": sum(self.rss_bytes.values()) if told else None,
            "gpu_percent": None,
            "busy": busy,
            "starved": starved,
            "blocked": None if busy is None or starved is None else 1.0 - busy - starved,
            "queued": self.queued,
        }


class Collector:
    """Gathers a run's samples. One actor, named raypipe-RUN_ID in the namespace `raypipe`, without a CPU of its own."""

    def __init__(self, run_id: str):
        self._run_id = run_id
        self._started = self._looked = time.time()
        self._latest: dict[str, Sample] = {}
        self._first: dict[str, Sample] = {}
        self._peak_by_stage: dict[str, int] = {}
        self._pools: dict[str, PoolView] = {}
        self._width = SAMPLE_EVERY_S
        self._buckets: dict[tuple[int, str], _Bucket] = {}

    def begin(self, at: float) -> None:
        """The execution begins: the timeline counts from here."""
        self._started = self._looked = at

    def record(self, sample: Sample) -> None:
        before = self._latest.get(sample.actor)
        if before is None:
            self._first[sample.actor] = before = sample
        elif sample.at < before.at:
            return
        self._latest[sample.actor] = sample
        together = sum(s.rss_bytes for s in self._latest.values() if s.stage == sample.stage and sample.at - s.at < 3)
        self._peak_by_stage[sample.stage] = max(self._peak_by_stage.get(sample.stage, 0), together)
        for bucket, share in self._between(before.at, sample.at, sample.stage):
            bucket.images += share * (sample.images - before.images)
            bucket.busy_s += share * (sample.busy_s - before.busy_s)
            bucket.cpu_s += share * (sample.cpu_s - before.cpu_s)
            bucket.rss_bytes[sample.actor] = sample.rss_bytes

    def _between(self, since: float, until: float, stage: str) -> list[tuple[_Bucket, float]]:
        """The stretches of the timeline between two moments, each with its share of the time: totals say nothing of the way there."""
        last = self._bucket(until, stage)  # first, as it may change the width
        seconds = range(int((since - self._started) // self._width), int((until - self._started) // self._width) + 1)
        if until <= since or len(seconds) < 2:
            return [(last, 1.0)]
        parts = []
        for second in seconds:
            begin = self._started + second * self._width
            inside = min(until, begin + self._width) - max(since, begin)
            parts.append((self._bucket(begin + self._width / 2, stage), inside / (until - since)))
        return parts

    def _bucket(self, at: float, stage: str) -> _Bucket:
        second = max(int((at - self._started) / self._width), 0)
        if second >= TIMELINE_BUCKETS:
            joined: dict[tuple[int, str], _Bucket] = {}
            for (earlier, of), bucket in sorted(self._buckets.items()):
                joined.setdefault((earlier // 2, of), _Bucket()).add(bucket)
            self._buckets = joined
            self._width *= 2
            return self._bucket(at, stage)
        return self._buckets.setdefault((second, stage), _Bucket())

    def observe(self, pools: dict[str, PoolView]) -> None:
        """The stages' actor pools as the execution sees them; totals since its start."""
        now = time.time()
        for stage, pool in pools.items():
            before = self._pools.get(stage) or PoolView()
            for bucket, share in self._between(self._looked, now, stage):
                bucket.actors, bucket.queued = pool.end, pool.queued
                bucket.actor_s += share * (pool.actor_s - before.actor_s)
                bucket.starved_s += share * (pool.starved_s - before.starved_s)
        self._looked = now
        self._pools = pools

    def snapshot(self) -> dict:
        """All that is known, as plain records: actors (latest samples), pools, timeline."""
        timeline = [
            {"t_s": second * self._width, "stage": stage, **bucket.record(self._width)}
            for (second, stage), bucket in sorted(self._buckets.items())
        ]
        nodes: dict[str, list[Sample]] = {}
        for actor, sample in self._latest.items():
            nodes.setdefault(sample.node, []).extend([self._first[actor], sample])
        return {
            "run_id": self._run_id,
            "started": self._started,
            "actors": [asdict(sample) for sample in self._latest.values()],
            "first": [asdict(sample) for sample in self._first.values()],
            "rss_peak_by_stage": dict(self._peak_by_stage),
            "pools": {stage: asdict(pool) for stage, pool in self._pools.items()},
            "timeline": timeline,
            "nodes": {
                node: {
                    "cpu_busy_s": max(s.node_cpu_busy_s for s in samples) - min(s.node_cpu_busy_s for s in samples),
                    "cpu_total_s": max(s.node_cpu_total_s for s in samples) - min(s.node_cpu_total_s for s in samples),
                }
                for node, samples in nodes.items()
            },
        }


def start_collector(run_id: str) -> ray.actor.ActorHandle:
    """Start the run's collector on this node; it ends with the driver."""
    return (
        ray.remote(Collector)
        .options(
            name=f"raypipe-{run_id}",
            namespace=NAMESPACE,
            num_cpus=0,
            # A lost message is made good by the next: totals are sent, not differences.
            max_restarts=0,
            max_task_retries=0,
        )
        .remote(run_id)
    )
