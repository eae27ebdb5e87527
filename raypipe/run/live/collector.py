"""The run's collector: one named actor that gathers what stages measure, keeps what a person or the planner wants, and says how it goes.

It keeps each actor's latest totals (so a lost or repeated message changes nothing), a timeline of seconds, and the last seconds more closely
for those who watch. It is the only meeting point of a run: actors send samples, the execution sends what it sees of its actor pools and takes
back the wanted counts, `raypipe watch | scale` and `Control` ask it.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from raypipe.insight import planner
from raypipe.insight.report import LAST, PoolView, verdict
from raypipe.run.cluster.session import beside_driver
from raypipe.run.live.metrics import Metrics
from raypipe.run.meter import SAMPLE_EVERY_S, Sample

NAMESPACE = "raypipe"

TIMELINE_BUCKETS = 3600
"""A timeline that grows longer has its buckets joined in pairs: an hour at a second each, a day at 32 s."""

WINDOW_S = 5.0
"""What "now" means for those who watch, and for the planner: long enough to even out shards of a second, short enough to follow a change."""

WINDOW_AT_MOST_S = 120.0

CALLS_PER_ACTOR = 2
"""The planner waits until a stage's actors have made so many calls each in the window: one call may be an odd one."""

SETTLE_S = 2.0
"""After a change has taken effect, as long is waited before costs are looked at again."""

WORTH_STARTING_S = 8.0
"""With less than this left to do, by the rate of now, new actors would hardly be up before the end."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run when its execution begins.

    `at_most`: actors of all stages together that Ray has logical CPUs for, those on GPUs not counted. `auto`: stages whose count the planner
    may change. `on_gpu`: stages each of whose actors holds one of the `gpus`.
    """

    input: str = ""
    output: str | None = None
    recipe: str = ""
    backend: str = ""
    images: int = 0
    cores: float = 1.0
    at_most: int = 1
    auto: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ()
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of one stage, all actors together, at one moment. `busy_s` and `core_wait_s` are of finished calls."""

    at: float
    calls: int
    images: int
    busy_s: float
    core_wait_s: float | None
    cpu_s: float
    actor_s: float
    starved_s: float
    spent_s: float  # busy, calls under way included
    gpu_seen_s: float
    gpu_busy_s: float


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
    gpu_seen_s: float = 0.0
    gpu_busy_s: float = 0.0

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
        self.gpu_seen_s += other.gpu_seen_s
        self.gpu_busy_s += other.gpu_busy_s

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
            "gpu_percent": 100 * self.gpu_busy_s / self.gpu_seen_s if self.gpu_seen_s else None,
            "busy": busy,
            "starved": starved,
            "blocked": None if busy is None or starved is None else 1.0 - busy - starved,
            "queued": self.queued,
        }


class Collector:
    """The actor, named raypipe-RUN_ID in the namespace `raypipe`, without a CPU of its own."""

    def __init__(
        self, run_id: str, facts: Facts | None = None, clock: Callable[[], float] = time.time
    ):
        self._run_id = run_id
        self._facts = facts or Facts()
        self._clock = clock
        self._started = self._looked = clock()
        self._latest: dict[str, Sample] = {}
        self._heard: dict[str, float] = {}  # when, by this node's clock
        self._first: dict[str, Sample] = {}
        self._peak_by_stage: dict[str, int] = {}
        self._pools: dict[str, PoolView] = {}
        self._width = SAMPLE_EVERY_S
        self._buckets: dict[tuple[int, str], _Bucket] = {}
        self._recent: dict[str, deque[_Totals]] = {}
        self._done: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._rejected = 0
        self._wanted: dict[str, int] = {}
        self._by_hand: set[str] = set()
        self._events: list[dict[str, Any]] = []
        self._settled_at = self._started
        self._metrics = Metrics(run_id)

    def begin(self, at: float) -> None:
        """The execution begins: the timeline counts from here."""
        self._started = self._looked = self._settled_at = at
        self._done = deque([(at, 0)])

    def progress(self, at: float, images: int, rejected: int) -> None:
        """The driver has so many images by now, rejected ones included."""
        self._done.append((at, images))
        while len(self._done) > 2 and self._done[1][0] < at - WINDOW_S:
            self._done.popleft()
        self._rejected = rejected

    # ---------------------------------------------------------------------------------------------------------- what actors send

    def record(self, sample: Sample) -> None:
        before = self._latest.get(sample.actor)
        if before is None:
            self._first[sample.actor] = before = sample
        elif sample.at < before.at:
            return
        self._latest[sample.actor] = sample
        self._heard[sample.actor] = self._clock()
        together = sum(
            s.rss_bytes
            for s in self._latest.values()
            if s.stage == sample.stage and self._there(s.actor)
        )
        self._peak_by_stage[sample.stage] = max(self._peak_by_stage.get(sample.stage, 0), together)
        for bucket, share in self._between(before.at, sample.at, sample.stage):
            bucket.images += share * (sample.images - before.images)
            bucket.busy_s += share * (sample.busy_s - before.busy_s)
            bucket.cpu_s += share * (sample.cpu_s - before.cpu_s)
            bucket.gpu_seen_s += share * (sample.gpu_seen_s - before.gpu_seen_s)
            bucket.gpu_busy_s += share * (sample.gpu_busy_s - before.gpu_busy_s)
            bucket.rss_bytes[sample.actor] = sample.rss_bytes

    def _there(self, actor: str) -> bool:
        """Whether the actor was heard of lately: by this node's clock, as that of another may differ."""
        return self._clock() - self._heard[actor] < 3 * SAMPLE_EVERY_S

    def _between(self, since: float, until: float, stage: str) -> list[tuple[_Bucket, float]]:
        """The stretches of the timeline between two moments, each with its share of the time: totals say nothing of the way there."""
        last = self._bucket(until, stage)  # first, as it may change the width
        seconds = range(
            int((since - self._started) // self._width),
            int((until - self._started) // self._width) + 1,
        )
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

    def observe(self, pools: dict[str, PoolView]) -> dict[str, int]:
        """The stages' actor pools as the execution sees them; totals since its start. Returns the wanted counts."""
        now = self._clock()
        for stage, pool in pools.items():
            self._wanted.setdefault(stage, pool.start)
        pools = pools | self._without_pool(pools)
        for stage, pool in pools.items():
            before = self._pools.get(stage) or PoolView()
            for bucket, share in self._between(self._looked, now, stage):
                bucket.actors, bucket.queued = pool.end, pool.queued
                bucket.actor_s += share * (pool.actor_s - before.actor_s)
                bucket.starved_s += share * (pool.starved_s - before.starved_s)
        self._looked = now
        self._pools = pools
        for stage in pools:
            self._remember(stage, now)
        self._steer(now)
        self._metrics.record(self.live(), self._latest.values())
        return self._wanted

    def _without_pool(self, pools: dict[str, PoolView]) -> dict[str, PoolView]:
        """The stages whose actors take their input by themselves, as those of `pools` are seen: Ray Data knows nothing of training workers."""
        views: dict[str, PoolView] = {}
        for actor, sample in self._latest.items():
            if sample.stage in pools or sample.starved_s is None:
                continue
            view = views.get(sample.stage) or PoolView()
            before = self._pools.get(sample.stage)
            running = view.running + self._there(actor)
            views[sample.stage] = replace(
                view,
                running=running,
                end=running,
                start=before.start if before else running,
                actor_s=view.actor_s + sample.at - self._first[actor].at,
                starved_s=view.starved_s + sample.starved_s,
            )
        return views

    def _remember(self, stage: str, now: float) -> None:
        samples = [sample for sample in self._latest.values() if sample.stage == stage]
        waits = [sample.core_wait_s for sample in samples if sample.core_wait_s is not None]
        pool = self._pools[stage]
        recent = self._recent.setdefault(stage, deque())
        recent.append(
            _Totals(
                at=now,
                calls=sum(sample.calls for sample in samples),
                images=sum(sample.images for sample in samples),
                busy_s=sum(sample.busy_s - sample.under_way_s for sample in samples),
                core_wait_s=sum(waits) if len(waits) == len(samples) else None,
                cpu_s=sum(sample.cpu_s for sample in samples),
                actor_s=pool.actor_s,
                starved_s=pool.starved_s,
                spent_s=sum(sample.busy_s for sample in samples),
                gpu_seen_s=sum(sample.gpu_seen_s for sample in samples),
                gpu_busy_s=sum(sample.gpu_busy_s for sample in samples),
            )
        )
        while len(recent) > 2 and recent[1].at < now - WINDOW_AT_MOST_S:
            recent.popleft()

    def _window(
        self, stage: str, *, calls: int = 0, since: float = 0.0
    ) -> tuple[_Totals, _Totals] | None:
        """The last WINDOW_S seconds of a stage, or as many as it takes for so many calls, but none before `since`."""
        recent = [totals for totals in self._recent.get(stage, ()) if totals.at >= since]
        if len(recent) < 2:
            return None
        last = recent[-1]
        for first in reversed(recent[:-1]):
            if last.at - first.at >= WINDOW_S and last.calls - first.calls >= calls:
                return first, last
        return (recent[0], last) if last.calls - recent[0].calls >= calls else None

    # ----------------------------------------------------------------------------------------------------------- what is wanted

    def scale(self, counts: dict[str, int]) -> dict[str, int] | str:
        """Set the count of actors of some stages, for good: the planner then leaves these alone. Returns all wanted counts; or, for
        what cannot be, the reason, and nothing is changed."""
        if not self._wanted:
            return "the run has not begun yet; try again when its first actors start"
        for stage, count in counts.items():
            if stage not in self._wanted:
                return f"this run has no stage {stage!r}; its stages are {', '.join(self._wanted)}"
            if count < 1:
                return "a stage needs at least 1 actor"
        wanted = self._wanted | counts
        on_gpu = {stage: count for stage, count in wanted.items() if stage in self._facts.on_gpu}
        on_cpu = {stage: count for stage, count in wanted.items() if stage not in on_gpu}
        if sum(on_cpu.values()) > self._facts.at_most:
            return (
                f"{_parts(on_cpu)} are {sum(on_cpu.values())} actors, but there is room for {self._facts.at_most} (a CPU of the cluster each, "
                f"or memory on a machine alone)"
            )
        if sum(on_gpu.values()) > self._facts.gpus:
            return f"{_parts(on_gpu)} take a GPU each, but there are {self._facts.gpus}"
        self._by_hand |= set(counts)
        self._change(counts, "user")
        return self._wanted

    def _change(self, counts: dict[str, int], by: str) -> None:
        now = self._clock()
        for stage, count in counts.items():
            if count != self._wanted[stage]:
                event = {
                    "t_s": max(now - self._started, 0.0),
                    "stage": stage,
                    "from": self._wanted[stage],
                    "to": count,
                    "by": by,
                }
                self._events.append(event)
        self._wanted = self._wanted | counts
        self._settled_at = now + SETTLE_S

    def _steer(self, now: float) -> None:
        """Let the planner change what it may, when the last change has taken effect and enough has been seen since."""
        auto = set(self._facts.auto) - self._by_hand
        if not auto or not self._pools or any(pool.done for pool in self._pools.values()):
            return
        if any(pool.pending or pool.draining or not pool.running for pool in self._pools.values()):
            self._settled_at = now + SETTLE_S
        costs = self._costs(since=self._settled_at, calls=CALLS_PER_ACTOR)
        if costs is None or self._left_s() < WORTH_STARTING_S:
            return
        fixed = {cost.name for cost in costs} - auto
        machine = planner.Machine(
            cores=self._facts.cores, actors=self._facts.at_most, gpus=self._facts.gpus or None
        )
        counts = planner.better(costs, machine, fixed=fixed)
        if counts is not None:
            self._change(counts, "auto")

    def _costs(self, *, since: float = 0.0, calls: int = 1) -> list[planner.StageCost] | None:
        """What an image costs each stage of late; None: some stage has not made so many calls an actor."""
        costs = []
        for stage, pool in self._pools.items():
            count = self._wanted.get(stage, pool.running)
            if pool.done or not count:
                continue
            window = self._window(stage, calls=calls * count, since=since)
            if window is None or window[1].images == window[0].images:
                return None
            first, last = window
            images = last.images - first.images
            wait_s = (
                None
                if first.core_wait_s is None or last.core_wait_s is None
                else last.core_wait_s - first.core_wait_s
            )
            costs.append(
                planner.StageCost(
                    name=stage,
                    actors=count,
                    busy_s=(last.busy_s - first.busy_s) / images,
                    cpu_s=(last.cpu_s - first.cpu_s) / images,
                    core_wait_s=None if wait_s is None else wait_s / images,
                    on_gpu=stage in self._facts.on_gpu,
                )
            )
        return costs or None

    # ---------------------------------------------------------------------------------------------------------- how it goes

    def _rate(self) -> float | None:
        (since, before), (until, images) = self._done[0], self._done[-1]
        until = max(until, self._clock())
        return (images - before) / (until - since) if images > before and until > since else None

    def _left_s(self) -> float:
        rate = self._rate()
        return (self._facts.images - self._done[-1][1]) / rate if rate else float("inf")

    def live(self) -> dict[str, Any]:
        """How the run goes, of late: JSON types; None is unknown. Shares and rates are of the last seconds (WINDOW_S)."""
        now = self._clock()
        left_s = self._left_s()
        stages = [self._stage(stage, pool) for stage, pool in self._pools.items()]
        used = [stage["cpu_percent"] for stage in stages if stage["cpu_percent"] is not None]
        rate = self._rate()
        return {
            "run_id": self._run_id,
            "at_s": max(now - self._started, 0.0),
            "input": self._facts.input,
            "output": self._facts.output,
            "recipe": self._facts.recipe,
            "backend": self._facts.backend,
            "images": self._facts.images,
            "done": self._done[-1][1],
            "rejected": self._rejected,
            "images_per_s": rate,
            "eta_s": left_s if left_s != float("inf") else None,
            "cores": self._facts.cores,
            "cpu_percent": sum(used) if used else None,
            "actors_at_most": self._facts.at_most,
            "auto": bool(set(self._facts.auto) - self._by_hand),
            "stages": stages,
            "verdict": self._verdict(stages, rate),
            "scale_events": list(self._events),
        }

    def _stage(self, stage: str, pool: PoolView) -> dict[str, Any]:
        fresh = [s for s in self._latest.values() if s.stage == stage and self._there(s.actor)]
        samples = [s for s in self._latest.values() if s.stage == stage]
        window = self._window(stage)
        took = window[1].at - window[0].at if window else 0.0
        record: dict[str, Any] = dict.fromkeys(
            ("images_per_s", "cpu_percent", "gpu_percent", "busy", "starved", "blocked")
        )
        if window and took > 0:
            first, last = window
            actor_s = last.actor_s - first.actor_s
            record["images_per_s"] = (last.images - first.images) / took
            record["cpu_percent"] = 100 * (last.cpu_s - first.cpu_s) / took / self._facts.cores
            if last.gpu_seen_s > first.gpu_seen_s:
                record["gpu_percent"] = (
                    100
                    * (last.gpu_busy_s - first.gpu_busy_s)
                    / (last.gpu_seen_s - first.gpu_seen_s)
                )
            if actor_s > 0:
                busy = min((last.spent_s - first.spent_s) / actor_s, 1.0)
                starved = (
                    1 - busy
                    if stage in LAST
                    else min((last.starved_s - first.starved_s) / actor_s, 1 - busy)
                )
                record |= {
                    "busy": max(busy, 0.0),
                    "starved": max(starved, 0.0),
                    "blocked": max(1 - busy - starved, 0.0),
                }
        return {
            "name": stage,
            "actors": pool.running,
            "pending": pool.pending,
            "draining": pool.draining,
            "wanted": self._wanted.get(stage, pool.running),
            "images": sum(sample.images for sample in samples),
            "rss_bytes": sum(sample.rss_bytes for sample in fresh) if fresh else None,
            "queued": pool.queued,
            **record,
        }

    def _verdict(self, stages: list[dict[str, Any]], rate: float | None) -> dict[str, Any]:
        costs = {cost.name: cost for cost in self._costs() or ()}
        if not costs or rate is None:
            reason = "Nothing can be said before every stage has finished a shard or two."
            return {"stage": None, "reason": reason, "advice": []}
        seen = [
            {
                **stage,
                "actors": {"max": stage["wanted"], "end": stage["wanted"]},
                "busy_s_per_image": costs[stage["name"]].busy_s,
                "cpu_s_per_image": costs[stage["name"]].cpu_s,
                "core_wait_s_per_image": costs[stage["name"]].core_wait_s,
                "on_gpu": costs[stage["name"]].on_gpu,
            }
            for stage in stages
            if stage["name"] in costs
        ]
        return verdict(seen, self._facts.cores, rate)

    def snapshot(self) -> dict:
        """All that is known, as plain records: actors (latest samples), pools, timeline, scale events."""
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
            "scale_events": list(self._events),
            "nodes": {
                node: {
                    "cpu_busy_s": max(s.node_cpu_busy_s for s in samples)
                    - min(s.node_cpu_busy_s for s in samples),
                    "cpu_total_s": max(s.node_cpu_total_s for s in samples)
                    - min(s.node_cpu_total_s for s in samples),
                }
                for node, samples in nodes.items()
            },
        }


def _parts(counts: dict[str, int]) -> str:
    return " + ".join(f"{count} {stage}" for stage, count in counts.items())


@contextlib.contextmanager
def collecting(run_id: str, facts: Facts) -> Iterator[ray.actor.ActorHandle]:
    """The run's collector, on this node, until the end of the block.

    Raises:
        ValueError: the cluster has a run of this name already.
    """
    options = beside_driver() | {"name": f"raypipe-{run_id}", "namespace": NAMESPACE}
    # A lost message is made good by the next: totals are sent, not differences.
    collector = (
        ray.remote(Collector)
        .options(**options, max_restarts=0, max_task_retries=0)
        .remote(run_id, facts)
    )
    try:
        yield collector
    finally:
        with contextlib.suppress(RayError):
            ray.kill(collector)
