"""The record of a run: report.json, as `build` makes it. Pure: no Ray here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raypipe.insight import forms, planner, states
from raypipe.insight.nodes import nodes_of
from raypipe.insight.states import (
    CONSUME,
    Consumed,
    Sample,
    Shares,
    Snapshot,
    Verdict,
)
from raypipe.insight.verdict import Measured, judge


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows.

    `before`: done by an earlier run into the same output. `unread`: the store did not give their
    bytes; the next run tries them again. `damaged_kept`: damaged images in `images_out`. `skipped`:
    files that the listing left out, by suffix. `boxes_dropped`: unusable boxes of delivered images.
    `boxes_from`: images whose boxes were drawn in another frame, by which. None: not known.
    """

    images_in: int
    images_out: int
    rejects_by_reason: dict[str, int]
    before: int = 0
    unread: int = 0
    damaged_kept: int | None = 0
    skipped: dict[str, int] = field(default_factory=dict)
    boxes_dropped: int | None = 0
    boxes_from: dict[str, int] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        return sum(self.rejects_by_reason.values())

    @property
    def lost(self) -> int:
        """Rows neither delivered, rejected nor unread. Above 0 the run has failed."""
        return self.images_in - self.images_out - self.rejected - self.unread

    @property
    def done_now(self) -> int:
        return self.images_out + self.rejected + self.unread - self.before


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds of a run.

    `setup_s`: listing, planning and starting Ray. `wall_s`: all that follows; the other fields
    count from its start. `ready_s`: when the preprocess actors became ready, their mean (None: not
    known). `outputs`: when each shard came out, with its images.
    """

    wall_s: float
    setup_s: float
    ready_s: float | None
    outputs: list[tuple[float, int]]

    @property
    def first_output_s(self) -> float | None:
        return self.outputs[0][0] if self.outputs else None

    @property
    def steady_s(self) -> float | None:
        """From when actors were ready to the last output."""
        if self.ready_s is None or not self.outputs or self.outputs[-1][0] <= self.ready_s:
            return None
        return self.outputs[-1][0] - self.ready_s

    @property
    def steady_images_per_s(self) -> float | None:
        """All images over `steady_s`. The start of Ray and of the actors is not in it; filling and
        emptying the pipeline are. Counting from the first output instead would count what the other
        actors have under way by then as free.
        """
        steady_s = self.steady_s
        return None if steady_s is None else sum(n for _, n in self.outputs) / steady_s


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


# --- stages -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the figures of a stage are computed from."""

    snapshot: Snapshot
    cores: float
    on_gpu: Collection[str]
    last: str
    consumer: Consumed | None


def _stage(name: str, run: _Run) -> dict[str, Any]:
    """The record of one stage."""
    snapshot = run.snapshot
    if name == CONSUME and run.consumer is not None:
        return _consumer(run.consumer, run.cores)
    actors = [actor for actor in snapshot.actors if actor.stage == name]
    images = sum(actor.images for actor in actors)
    busy_s = sum(actor.busy_s for actor in actors)
    cpu_s = sum(actor.cpu_s for actor in actors)
    waits = [actor.core_wait_s for actor in actors if actor.core_wait_s is not None]
    core_wait_s = sum(waits) if len(waits) == len(actors) else None
    gpu_seen_s = sum(actor.gpu_seen_s for actor in actors)
    gpu_memory = [a.gpu_memory_peak_bytes for a in actors if a.gpu_memory_peak_bytes is not None]
    first = min((sample.at for sample in snapshot.first if sample.stage == name), default=0.0)
    last = max((actor.at for actor in actors), default=0.0)
    pool = snapshot.pools.get(name, states.PoolView())
    divided = states.shares(
        busy_s=busy_s, starved_s=pool.starved_s, actor_s=pool.actor_s, last=name == run.last
    )
    return {
        "name": name,
        "on_gpu": name in run.on_gpu,
        "actors": _counts(pool),
        "images": images,
        "cpu_s_per_image": _ratio(cpu_s, images),
        "busy_s_per_image": _ratio(busy_s, images),
        "core_wait_s_per_image": None if core_wait_s is None else _ratio(core_wait_s, images),
        "cpu_percent": _ratio(100 * cpu_s, (last - first) * run.cores),
        "rss_peak_bytes": snapshot.rss_peak_by_stage.get(name),
        "private_peak_bytes": snapshot.private_peak_by_stage.get(name),
        "gpu_percent": _ratio(100 * sum(actor.gpu_busy_s for actor in actors), gpu_seen_s),
        "gpu_memory_peak_bytes": max(gpu_memory, default=None),
        "bytes_in": sum(actor.bytes_in for actor in actors),
        "bytes_out": sum(actor.bytes_out for actor in actors),
        **_divided(divided),
        "steps": states.step_records(actors, images, divided),
    }


def _counts(pool: states.PoolView) -> dict[str, int]:
    return {"start": pool.start, "min": pool.min, "max": pool.max, "end": pool.end}


def _divided(found: Shares | None) -> dict[str, float | None]:
    return dict.fromkeys(states.STATES) if found is None else asdict(found)


def _consumer(consumer: Consumed, cores: float) -> dict[str, Any]:
    """The record of what takes the last blocks. Its memory is the driver's and is not known."""
    pool = consumer.pool()
    divided = states.shares(
        busy_s=consumer.busy_s, starved_s=pool.starved_s, actor_s=pool.actor_s, last=True
    )
    unknown = (
        "core_wait_s_per_image",
        "rss_peak_bytes",
        "private_peak_bytes",
        "gpu_percent",
        "gpu_memory_peak_bytes",
        "bytes_in",
        "bytes_out",
    )
    return {
        "name": CONSUME,
        "on_gpu": False,
        "fixed": True,
        "actors": _counts(pool),
        "images": consumer.images,
        "cpu_s_per_image": _ratio(consumer.cpu_s, consumer.images),
        "busy_s_per_image": _ratio(consumer.busy_s, consumer.images),
        "cpu_percent": _ratio(100 * consumer.cpu_s, pool.actor_s * cores),
        **dict.fromkeys(unknown),
        **_divided(divided),
        "steps": [],
    }


# --- the machine --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The work alone. None: not known.

    `seconds`: from when the last of the initial actors was ready, to the last output.
    `cpu_percent`: mean use of the `cores` of the nodes with actors meanwhile, 0 to 100.
    `before_s`: from its begin to the first output. Unlike the steady rate, these are of use only
    where no actor began before all others were ready.
    """

    seconds: float | None = None
    cpu_percent: float | None = None
    cores: float = 0.0
    before_s: float | None = None


def _at(sample: Sample) -> float:
    return sample.at


def _work(snapshot: Snapshot, clock: Clock) -> _Work:
    began: list[Sample] = []
    for stage in {sample.stage for sample in snapshot.first}:
        ready = sorted((s for s in snapshot.first if s.stage == stage), key=_at)
        began += ready[: snapshot.pools.get(stage, states.PoolView()).start or None]
    if not began or not clock.outputs:
        return _Work()
    begin_s = max(sample.at for sample in began) - snapshot.started
    work_s = clock.outputs[-1][0] - begin_s
    used = total = cores = 0.0
    for node in {sample.node for sample in began}:
        first = max((sample for sample in began if sample.node == node), key=_at)
        last = max((sample for sample in snapshot.actors if sample.node == node), key=_at)
        if last.at > first.at:
            used += last.node_cpu_busy_s - first.node_cpu_busy_s
            total += last.node_cpu_total_s - first.node_cpu_total_s
            cores += (last.node_cpu_total_s - first.node_cpu_total_s) / (last.at - first.at)
    return _Work(
        seconds=work_s if work_s > 0 else None,
        cpu_percent=100 * used / total if total > 0 else None,
        cores=cores,
        before_s=max(clock.outputs[0][0] - begin_s, 0.0),
    )


def _held_by_others(snapshot: Snapshot, work: _Work, driver_cpu_s: float) -> float:
    """Percent of the cores, as `planner.held_by_others`; 0 where it is not known."""
    if not work.seconds or work.cpu_percent is None:
        return 0.0
    own_s = sum(actor.cpu_s + planner.END_S for actor in snapshot.actors) + driver_cpu_s
    return planner.held_by_others(work.cpu_percent, own_s / work.seconds, work.cores)


def _overhead(snapshot: Snapshot, stages: Sequence[Mapping[str, Any]]) -> float | None:
    """CPU seconds an image that Ray's own processes took on the nodes while the stages worked."""
    images = max((stage["images"] for stage in stages), default=0)
    own = sum(actor.cpu_s for actor in snapshot.actors)
    if not images or not own or not snapshot.nodes:
        return None
    busy = sum(node.cpu_busy_s for node in snapshot.nodes.values())
    return min(max(busy - own, 0.0), planner.RAYS_SHARE * own) / images


def _fixed_s(work: _Work, clock: Clock, stages: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that a run of this shape spends before its first image and after its last.

    The time to the first output is taken less what its shard took in the stages, which is work.
    """
    if work.before_s is None:
        return None
    shard_s = clock.outputs[0][1] * sum(stage["busy_s_per_image"] or 0.0 for stage in stages)
    return max(work.before_s - shard_s, 0.0) + max(clock.wall_s - clock.outputs[-1][0], 0.0)


# --- the report ---------------------------------------------------------------------------------

NOTHING_SEEN = Snapshot()
"""The snapshot of a collector that was killed."""

_NO_COLLECTOR = (
    "What the stages cost is not known: the actor that collects it was killed. "
    "The counts are right."
)
_NO_DRIVER = (
    "What this run cost is not known: its driver ended before it could report. "
    "The counts are the journal's."
)


def build(
    *,
    run_id: str,
    settings: dict[str, Any],
    versions: dict[str, Any],
    hardware: dict[str, Any],
    counts: Counts,
    clock: Clock,
    cpu_percent: float | None,
    driver_cpu_s: float = 0.0,
    stage_names: Sequence[str],
    on_gpu: Collection[str] = (),
    snapshot: Snapshot,
    predicted: float | None = None,
    consumer: Consumed | None = None,
) -> dict[str, Any]:
    """The report, as JSON types. A figure that could not be measured is None.

    Args:
        hardware: `cores` of all nodes together, and what else is known.
        cpu_percent: mean of all cores over the run, 0 to 100.
        driver_cpu_s: CPU seconds of the driver process, with what it does with the results.
        stage_names: in the order of the pipeline.
        on_gpu: stages each of whose actors holds a GPU, whether or not it could be observed.
        snapshot: from the run's collector (raypipe.run.live.collector.Collector.snapshot).
        predicted: images/s that the planner expected of the initial actors.
        consumer: what took the last blocks; it becomes the last stage, `consume`.

    Returns:
        The record that design.md calls report.json. Of each stage, `cpu_percent` is 0 to 100 of all
        cores, from its first actor's start to its last work; `rss_peak_bytes` and
        `private_peak_bytes` are the largest sums over its actors. The first counts shared pages in
        each actor, the second once. `busy`, `starved` and `blocked` are shares of its actors' time.
        `steps` are what its actors do in a row (none of a training's workers and of `consume`); the
        `busy` of steps sum to the stage's, and what Ray does between calls is in the stage's CPU
        only.
        `object_store_peak_bytes` is the shared memory of the nodes, counted once. `work_s` counts
        from when the last of the initial actors was ready to the last output; `work_cpu_percent` is
        the machine meanwhile.
        `fixed_s` is what a run of this shape spends before its first image and after its last.
        `stages_cpu_percent` and `other_cpu_percent` divide `cpu_percent`. `nodes` are those that
        had actors (`nodes_of`). `writing` is which form
        of writing ran, and what the other would have given (`forms.told`).
    """
    cores = hardware["cores"]
    images_per_s = _ratio(counts.done_now, clock.wall_s)
    if snapshot == NOTHING_SEEN:
        known = unmeasured(run_id=run_id, settings=settings, versions=versions, counts=counts)
        return known | {
            "hardware": hardware,
            "setup_s": clock.setup_s,
            "wall_s": clock.wall_s,
            "first_output_s": clock.first_output_s,
            "images_per_s": images_per_s,
            "cpu_percent": cpu_percent,
            "verdict": Verdict(stage=None, reason=_NO_COLLECTOR).json(),
        }
    names = [*stage_names, *([CONSUME] if consumer is not None else [])]
    run = _Run(snapshot=snapshot, cores=cores, on_gpu=on_gpu, last=names[-1], consumer=consumer)
    stages = [_stage(name, run) for name in names]
    steady = clock.steady_images_per_s
    work = _work(snapshot, clock)
    overhead_s = _overhead(snapshot, stages)
    own_s = sum(actor.cpu_s for actor in snapshot.actors) + (consumer.cpu_s if consumer else 0.0)
    stages_percent = _ratio(100 * own_s, clock.wall_s * cores)
    said = judge(
        planner.costs_of(stages),
        {stage["name"]: _shares_of(stage) for stage in stages},
        Measured(
            cores=cores,
            images_per_s=steady or images_per_s or 0.0,
            seconds=clock.steady_s or 0.0,
            held=_held_by_others(snapshot, work, driver_cpu_s),
            overhead_s=overhead_s or 0.0,
            resized=any(pool.min != pool.max for pool in snapshot.pools.values()),
        ),
    )
    record = {
        "run_id": run_id,
        "settings": settings,
        "versions": versions,
        "hardware": hardware,
        **_counted(counts),
        "setup_s": clock.setup_s,
        "ready_s": clock.ready_s,
        "wall_s": clock.wall_s,
        "first_output_s": clock.first_output_s,
        "images_per_s": images_per_s,
        "steady_images_per_s": steady,
        "cpu_percent": cpu_percent,
        "stages_cpu_percent": stages_percent,
        "other_cpu_percent": states.unused(cpu_percent, stages_percent),
        "object_store_peak_bytes": snapshot.store_peak_bytes,
        "work_s": work.seconds,
        "work_cpu_percent": work.cpu_percent,
        "fixed_s": _fixed_s(work, clock, stages),
        "overhead_cpu_s_per_image": overhead_s,
        "stages": stages,
        "nodes": nodes_of(snapshot),
        "verdict": said.json(),
        "predicted": None
        if predicted is None
        else {
            "images_per_s": predicted,
            "measured_images_per_s": steady,
            "actors": {stage["name"]: stage["actors"]["start"] for stage in stages},
        },
        "scale_events": [event.json() for event in snapshot.scale_events],
        "timeline": [asdict(moment) for moment in snapshot.timeline],
    }
    return record | {"writing": forms.told(record, steady or images_per_s or 0.0)}


def unmeasured(
    *, run_id: str, settings: dict[str, Any], versions: dict[str, Any], counts: Counts
) -> dict[str, Any]:
    """The report of a run of which only the journal is left: `build`'s keys, figures None."""
    figures = (
        "setup_s",
        "ready_s",
        "wall_s",
        "first_output_s",
        "images_per_s",
        "steady_images_per_s",
        "cpu_percent",
        "stages_cpu_percent",
        "other_cpu_percent",
        "object_store_peak_bytes",
        "work_s",
        "work_cpu_percent",
        "fixed_s",
        "overhead_cpu_s_per_image",
        "predicted",
        "writing",
    )
    return {
        "run_id": run_id,
        "settings": settings,
        "versions": versions,
        "hardware": dict.fromkeys(("cores", "nodes", "gpus", "memory_bytes", "processor")),
        **_counted(counts),
        **dict.fromkeys(figures),
        "stages": [],
        "nodes": [],
        "verdict": Verdict(stage=None, reason=_NO_DRIVER).json(),
        "scale_events": [],
        "timeline": [],
    }


def _counted(counts: Counts) -> dict[str, Any]:
    return {
        "images_in": counts.images_in,
        "images_out": counts.images_out,
        "images_rejected": counts.rejected,
        "images_unread": counts.unread,
        "images_done_before": counts.before,
        "images_damaged_kept": counts.damaged_kept,
        "rejects_by_reason": counts.rejects_by_reason,
        "skipped": counts.skipped,
        "boxes_dropped": counts.boxes_dropped,
        "boxes_from": counts.boxes_from,
    }


def _shares_of(stage: Mapping[str, Any]) -> Shares | None:
    if stage["busy"] is None:
        return None
    return Shares(**{state: stage[state] for state in states.STATES})
