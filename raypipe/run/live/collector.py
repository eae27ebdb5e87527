"""The run's collector: one named actor where a run meets those who measure, watch and scale it.

Actors send samples, the execution sends its actor pools and takes back the wanted counts, the
driver sends its progress. `raypipe watch | scale` and `Control` ask it. It keeps each actor's
latest totals, so that a lost or repeated message changes nothing.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import ray
from ray.exceptions import RayError

from raypipe.errors import UsageError
from raypipe.insight import planner
from raypipe.insight.remarks import Notice
from raypipe.insight.states import (
    CONSUME,
    SAMPLE_EVERY_S,
    STATES,
    Consumed,
    LiveRun,
    LiveStage,
    NodeCpu,
    Orders,
    PoolView,
    Sample,
    Shares,
    Snapshot,
    Verdict,
    unused,
)
from raypipe.insight.verdict import Measured, judge
from raypipe.run.cluster.machine import beside_driver
from raypipe.run.live.cluster import Nodes
from raypipe.run.live.metrics import Metrics, Place, Places, Share
from raypipe.run.live.recent import WINDOW_S, Recent, of_actors, of_consumer, pools_without
from raypipe.run.live.steering import CALLS_PER_ACTOR, Facts, Steering, changing
from raypipe.run.live.timeline import Timeline

NAMESPACE = "raypipe"

ENDS_WITHIN_S = 10.0


class Collector:
    """The actor, named raypipe-RUN_ID in the namespace `raypipe`, without a CPU of its own."""

    def __init__(
        self, run_id: str, facts: Facts | None = None, clock: Callable[[], float] = time.time
    ):
        self._run_id = run_id
        self._facts = facts or Facts()
        self._clock = clock
        self._started = self._looked = self._moved = clock()
        self._latest: dict[str, Sample] = {}
        self._heard: dict[str, float] = {}  # when, by this node's clock
        self._worked: dict[str, float] = {}  # so too, when it was last in a call
        self._first: dict[str, Sample] = {}
        self._rss_peak: dict[str, int] = {}
        self._private_peak: dict[str, int] = {}
        self._stores: dict[str, int] = {}  # by node, of late
        self._store_peak: int | None = None
        self._pools: dict[str, PoolView] = {}
        self._consumed: tuple[float, Consumed] | None = None
        self._timeline = Timeline(self._started, SAMPLE_EVERY_S)
        self._recent = Recent()
        self._steering = Steering(self._facts, self._started)
        self._nodes = Nodes(run_id, self._facts, self._steering)
        self._done: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._rejected = 0
        self._metrics = Metrics(run_id)
        self._places = Places()
        self._shares: dict[Place, Share] = {}

    def begin(self, at: float) -> None:
        """The execution begins: the timeline counts from here."""
        self._started = self._looked = self._moved = at
        self._timeline.begin(at)
        self._steering.begin(at)
        self._done = deque([(at, 0)])

    # --- what is reported -----------------------------------------------------------------------

    def progress(
        self, at: float, images: int, rejected: int, consumed: Consumed | None = None
    ) -> None:
        """The driver has so many images by now, rejected ones included.

        Args:
            consumed: what it did with them, where it does anything (stage `consume`).
        """
        if images > self._done[-1][1]:
            self._moved = self._clock()
        self._done.append((at, images))
        while len(self._done) > 2 and self._done[1][0] < at - WINDOW_S:
            self._done.popleft()
        self._rejected = rejected
        if consumed is not None:
            since, before = self._consumed or (
                self._started,
                Consumed(images=0, busy_s=0.0, waiting_s=0.0),
            )
            self._timeline.consumer(
                CONSUME,
                since,
                at,
                images=consumed.images - before.images,
                busy_s=consumed.busy_s - before.busy_s,
                cpu_s=consumed.cpu_s - before.cpu_s,
            )
            self._consumed = (at, consumed)

    def record(self, sample: Sample) -> None:
        """An actor sends its totals."""
        before = self._latest.get(sample.actor)
        if before is None:
            self._first[sample.actor] = before = sample
        elif sample.at < before.at:
            return
        self._latest[sample.actor] = sample
        self._heard[sample.actor] = self._clock()
        if sample.calls > before.calls or sample is before:
            self._moved = self._clock()
        if sample.calls > before.calls or sample.under_way_s > 0:
            self._worked[sample.actor] = self._clock()
        self._timeline.actor(before, sample)
        there = [s for s in self._latest.values() if s.stage == sample.stage and self._there(s)]
        rss_bytes = sum(s.rss_bytes for s in there)
        self._rss_peak[sample.stage] = max(self._rss_peak.get(sample.stage, 0), rss_bytes)
        if (private_bytes := _private(there)) is not None:
            peak = self._private_peak.get(sample.stage, 0)
            self._private_peak[sample.stage] = max(peak, private_bytes)
        if sample.node_store_bytes is not None:
            self._stores[sample.node] = sample.node_store_bytes
            self._store_peak = max(self._store_peak or 0, sum(self._stores.values()))

    def _there(self, sample: Sample) -> bool:
        """Whether its actor was heard of lately, by this node's clock: another may differ."""
        return self._clock() - self._heard[sample.actor] < 3 * SAMPLE_EVERY_S

    def observe(self, pools: dict[str, PoolView]) -> Orders:
        """The execution reports its actor pools, with totals since its start, and gets orders."""
        now = self._clock()
        self._nodes.look(now)
        for stage, pool in pools.items():
            self._steering.seen(stage, pool)
        there = {actor for actor, sample in self._latest.items() if self._there(sample)}
        pools = pools | pools_without(pools, self._latest, self._first, self._pools, there)
        if self._consumed is not None:
            pools[CONSUME] = self._consumed[1].pool()
        for stage, pool in pools.items():
            before = self._pools.get(stage, PoolView())
            self._timeline.pool(stage, self._looked, now, before, pool)
        self._looked = now
        self._pools = pools
        for stage, pool in pools.items():
            samples = [sample for sample in self._latest.values() if sample.stage == stage]
            consumed = self._consumed[1] if self._consumed and stage == CONSUME else None
            self._recent.remember(
                stage,
                of_actors(now, samples, pool)
                if consumed is None
                else of_consumer(now, consumed, pool),
            )
        self._recent.remember_machine(now, self._latest.values())
        self._steering.steer(
            now,
            pools,
            lambda since: self._costs(since=since, calls=CALLS_PER_ACTOR),
            self._left_s(),
        )
        self._measure(now)
        return Orders(
            counts=self._steering.wanted,
            at_work=frozenset(sample.actor.partition("-")[0] for sample in self._at_work()),
        )

    def _measure(self, now: float) -> None:
        """Set the metrics."""
        self._shares = self._places.look(now, self._latest.values())
        self._metrics.record(self.live(), self._shares)

    def _at_work(self) -> list[Sample]:
        """The latest samples of actors that are in a call, or were just now."""
        since = self._clock() - 3 * SAMPLE_EVERY_S
        worked = (actor for actor, at in self._worked.items() if at > since)
        return [self._latest[actor] for actor in worked]

    def end(self) -> None:
        """The run ends: withdraw its requests, and end this actor in order.

        Ray then hands the metrics of the last seconds to its agent. A killed actor loses them.
        """
        self._nodes.withdraw()
        self._measure(self._clock())
        ray.actor.exit_actor()

    def cannot_scale(self, reason: str) -> None:
        """The execution has no pools that can be resized. `reason`: for who asks."""
        self._steering.unscalable = reason

    def scale(self, counts: dict[str, int]) -> dict[str, int] | str:
        """As `Steering.scale`: all wanted counts, or why nothing was changed."""
        return self._steering.scale(counts, self._clock())

    # --- how it goes ----------------------------------------------------------------------------

    def _costs(self, *, since: float = 0.0, calls: int = 1) -> list[planner.StageCost] | None:
        """What an image cost each stage of late; None: some stage has not made so many calls an
        actor."""
        costs = []
        for stage, pool in self._pools.items():
            count = self._steering.wanted.get(stage, pool.running)
            if pool.done or not count:
                continue
            window = self._recent.window(stage, calls=calls * count, since=since)
            if window is None or not window.images:
                return None
            on_gpu = stage in self._facts.on_gpu
            fixed = stage == CONSUME
            cost = window.cost(stage, actors=count, on_gpu=on_gpu, fixed=fixed)
            costs.append(replace(cost, holds=self._facts.holds.get(stage, 0)))
        return costs or None

    def _rate(self) -> float | None:
        (since, before), (until, images) = self._done[0], self._done[-1]
        until = max(until, self._clock())
        return (images - before) / (until - since) if images > before and until > since else None

    def _left_s(self) -> float:
        rate = self._rate()
        return (self._facts.images - self._done[-1][1]) / rate if rate else float("inf")

    def _last(self) -> str | None:
        """The stage that none follows."""
        return next(reversed(self._pools), None)

    def live(self) -> LiveRun:
        """How the run goes. Shares and rates are of the last seconds (`recent.WINDOW_S`)."""
        now = self._clock()
        at_s = max(now - self._started, 0.0)
        left_s, rate = self._left_s(), self._rate()
        stages = [self._stage(stage, pool) for stage, pool in self._pools.items()]
        used = [stage.cpu_percent for stage in stages if stage.cpu_percent is not None]
        machine, by_stages = self._recent.machine_percent(), sum(used) if used else None
        return LiveRun(
            run_id=self._run_id,
            at_s=at_s,
            input=self._facts.input,
            output=self._facts.output,
            recipe=self._facts.recipe,
            backend=self._facts.backend,
            images=self._facts.images,
            done=self._done[-1][1],
            rejected=self._rejected,
            images_per_s=rate,
            eta_s=left_s if left_s != float("inf") else None,
            cores=self._steering.room.cores,
            cpu_percent=machine,
            stages_cpu_percent=by_stages,
            other_cpu_percent=unused(machine, by_stages),
            object_store_bytes=sum(self._stores.values()) if self._stores else None,
            actors_at_most=self._steering.most.actors,
            auto=bool(self._steering.auto),
            stages=tuple(stages),
            verdict=self._verdict(stages, rate, at_s),
            scale_events=tuple(self._steering.events),
            waiting=" ".join(text for _, text in self.notices()) or None,
            nodes=self._nodes.live(self._shares, self._recent.node_percents()),
        )

    def notices(self) -> list[Notice]:
        """What the run waits for, for the driver's watchdog."""
        now = self._clock()
        self._nodes.look(now)
        at_work = Counter(sample.stage for sample in self._at_work())
        idle_s = now - self._moved
        found = self._nodes.notices(now, self._pools, at_work=at_work, idle_s=idle_s)
        if self._steering.unscalable and not self._facts.unscalable:
            said = self._steering.unscalable
            found.append(("unscalable", f"{said[0].upper()}{said[1:]}."))
        return found

    def _stage(self, stage: str, pool: PoolView) -> LiveStage:
        samples = [s for s in self._latest.values() if s.stage == stage]
        there = [sample for sample in samples if self._there(sample)]
        images = sum(sample.images for sample in samples)
        if self._consumed is not None and stage == CONSUME:
            images = self._consumed[1].images
        known = LiveStage(
            name=stage,
            actors=pool.running,
            pending=pool.pending,
            draining=pool.draining,
            wanted=self._steering.asked.get(stage, pool.running),
            images=images,
            queued=pool.queued,
            rss_bytes=sum(sample.rss_bytes for sample in there) if there else None,
            private_bytes=_private(there),
        )
        window = self._recent.window(stage)
        if window is None or window.took_s <= 0:
            return known
        divided = window.shares(last=stage == self._last())
        return replace(
            known,
            images_per_s=window.images_per_s,
            cpu_percent=100 * window.cpu_cores / self._steering.room.cores,
            gpu_percent=window.gpu_percent,
            busy=None if divided is None else divided.busy,
            starved=None if divided is None else divided.starved,
            blocked=None if divided is None else divided.blocked,
            steps=window.steps(divided, self._steering.room.cores),
        )

    def _verdict(self, stages: list[LiveStage], rate: float | None, at_s: float) -> Verdict:
        costs = self._costs()
        if not costs or rate is None:
            reason = "Nothing can be said before every stage has finished a shard or two."
            return Verdict(stage=None, reason=reason)
        # While actors start, costs are of those wanted and the rate is of those there.
        settled = not changing(self._pools) and self._clock() > self._steering.settled_at + WINDOW_S
        names = {cost.name for cost in costs}
        measured = Measured(
            cores=self._steering.room.cores,
            images_per_s=rate,
            seconds=at_s if settled else 0.0,
        )
        return judge(costs, {s.name: _shares(s) for s in stages if s.name in names}, measured)

    def snapshot(self) -> Snapshot:
        """All that is known, for the report."""
        nodes: dict[str, list[Sample]] = {}
        for actor, sample in self._latest.items():
            nodes.setdefault(sample.node, []).extend([self._first[actor], sample])
        return Snapshot(
            started=self._started,
            actors=tuple(self._latest.values()),
            first=tuple(self._first.values()),
            pools=dict(self._pools),
            rss_peak_by_stage=dict(self._rss_peak),
            private_peak_by_stage=dict(self._private_peak),
            store_peak_bytes=self._store_peak,
            nodes={node: _cpu(samples) for node, samples in nodes.items()},
            node_names=dict(self._nodes.names),
            timeline=tuple(self._timeline.moments(self._last())),
            scale_events=tuple(self._steering.events),
        )


def _shares(stage: LiveStage) -> Shares | None:
    if stage.busy is None:
        return None
    return Shares(**{state: getattr(stage, state) for state in STATES})


def _private(samples: list[Sample]) -> int | None:
    """Private memory of actors together; None: not known."""
    known = [s.private_bytes for s in samples if s.private_bytes is not None]
    return sum(known) if known and len(known) == len(samples) else None


def _cpu(samples: list[Sample]) -> NodeCpu:
    busy = [sample.node_cpu_busy_s for sample in samples]
    total = [sample.node_cpu_total_s for sample in samples]
    return NodeCpu(cpu_busy_s=max(busy) - min(busy), cpu_total_s=max(total) - min(total))


@contextlib.contextmanager
def collecting(run_id: str, facts: Facts) -> Iterator[ray.actor.ActorHandle]:
    """The run's collector, on this node, until the end of the block.

    Raises:
        UsageError: the cluster has a run of this name already.
    """
    options = beside_driver() | {"name": f"raypipe-{run_id}", "namespace": NAMESPACE}
    # The next message makes up for a lost one: totals are sent, not differences.
    actor = ray.remote(Collector).options(**options, max_restarts=0, max_task_retries=0)
    try:
        collector = actor.remote(run_id, facts)
    except ValueError as error:  # the name is taken
        raise UsageError(
            f"--run-id {run_id} is the id of a run in progress on this cluster. Nothing was "
            f"changed. Give another one, or wait for that run (`raypipe watch {run_id}`)."
        ) from error
    try:
        yield collector
    finally:
        # Ray would start again for a call after its end.
        if ray.is_initialized():
            with contextlib.suppress(RayError):
                if facts.moves:
                    ray.get(collector.end.remote(), timeout=ENDS_WITHIN_S)
            with contextlib.suppress(RayError):
                ray.kill(collector)
