"""What is measured of a run, as typed records, and how a stage's time divides into states.

Actors send `Sample`, the execution sends `PoolView`, the driver sends `Consumed`. The collector of
the run keeps them and gives out a `Snapshot` (for the report) and a `LiveRun` record (for those who
watch). Only `shares` divides time into busy, starved and blocked. The table of the report, its
timeline and the live view all call it, so they agree.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raypipe.insight.planner import Change

STATES = ("busy", "starved", "blocked")

CONSUME = "consume"
"""The stage that takes the last blocks: the caller's own function or loop."""

SAMPLE_EVERY_S = 1.0
"""How often an actor sends its totals within a long call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTotals:
    """Running totals of one step that actors do. What Ray does between calls is in none."""

    name: str
    busy_s: float = 0.0
    core_wait_s: float | None = 0.0  # part of busy_s; None: not known
    cpu_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0

    def plus(self, other: "StepTotals", times: int = 1) -> "StepTotals":
        """These and `times` the other's."""
        known = self.core_wait_s is not None and other.core_wait_s is not None
        return StepTotals(
            name=self.name,
            busy_s=self.busy_s + times * other.busy_s,
            core_wait_s=(self.core_wait_s or 0) + times * (other.core_wait_s or 0)
            if known
            else None,
            cpu_s=self.cpu_s + times * other.cpu_s,
            bytes_in=self.bytes_in + times * other.bytes_in,
            bytes_out=self.bytes_out + times * other.bytes_out,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Running totals of one actor process since it was ready."""

    stage: str
    actor: str  # names the process: a restarted actor is another one
    node: str
    at: float  # time.time()
    calls: int
    images: int
    bytes_in: int
    bytes_out: int
    busy_s: float
    under_way_s: float  # part of busy_s: in the call under way, whose images do not count yet
    core_wait_s: float | None  # part of busy_s: runnable, waiting for a core; None: not known
    cpu_s: float
    rss_bytes: int
    rss_peak_bytes: int
    node_cpu_busy_s: float
    node_cpu_total_s: float
    starved_s: float | None = None  # without input; None: the execution knows it, not the actor
    gpu_seen_s: float = 0.0  # how long its GPU was observed; 0: it has none
    gpu_busy_s: float = 0.0
    gpu_memory_peak_bytes: int | None = None
    private_bytes: int | None = None  # as raypipe.run.meter.private_bytes
    node_store_bytes: int | None = None  # shared memory in use on the node
    steps: tuple[StepTotals, ...] = ()  # in order; empty: the actor does no steps


def steps_of(samples: Iterable[Sample]) -> tuple[StepTotals, ...]:
    """The totals of each step, over all actors."""
    found: dict[str, StepTotals] = {}
    for sample in samples:
        for step in sample.steps:
            found[step.name] = found.get(step.name, StepTotals(name=step.name)).plus(step)
    return tuple(found.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolView:
    """A stage's actors as the execution saw them: counts, and seconds summed over actors.

    An actor that Ray starts again, as its node was lost, is pending like a new one.
    """

    start: int = 0
    min: int = 0
    max: int = 0
    end: int = 0
    running: int = 0
    pending: int = 0  # starting
    draining: int = 0  # part of running: they finish what they have, and go
    done: bool = False  # nothing is left for the stage to do
    queued: int = 0  # blocks that wait for the stage
    actor_s: float = 0.0  # ready, whatever they did
    starved_s: float = 0.0  # idle while no input waited


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What the collector tells an execution.

    counts: the wanted actors of each stage. at_work: the ids of actors that are in a call.
    """

    counts: Mapping[str, int]
    at_work: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumed:
    """What the driver did with the last blocks: totals since the execution began.

    `busy_s`: inside the caller's function. `waiting_s`: waiting for the next block.
    `cpu_s`: CPU seconds of the driver meanwhile.
    """

    images: int
    busy_s: float
    waiting_s: float
    cpu_s: float = 0.0

    def pool(self) -> PoolView:
        """The consumer as a stage with one actor."""
        return PoolView(
            start=1,
            min=1,
            max=1,
            end=1,
            running=1,
            actor_s=self.busy_s + self.waiting_s,
            starved_s=self.waiting_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Where the time of a stage's actors went; the three sum to 1."""

    busy: float
    starved: float
    blocked: float


def shares(*, busy_s: float, starved_s: float, actor_s: float, last: bool) -> Shares | None:
    """Divide the time of a stage's actors; None where there was none.

    Args:
        busy_s: seconds of work, summed over actors.
        starved_s: seconds idle while no input waited.
        actor_s: seconds in which actors were ready.
        last: no stage follows, so that idle time is never "blocked".
    """
    # Actors and the execution use two clocks (10 Hz there, every call here), which differ a little.
    total = max(actor_s, busy_s)
    if total <= 0:
        return None
    busy = max(busy_s, 0.0) / total
    starved = 1 - busy if last else min(max(starved_s, 0.0) / total, 1 - busy)
    return Shares(busy=busy, starved=starved, blocked=max(1 - busy - starved, 0.0))


def busy_shares(divided: Shares | None, steps: Sequence[StepTotals]) -> dict[str, float | None]:
    """The part of the actors' time that each step was busy; their sum is `busy` of the stage.

    What Ray does between calls counts for the steps in proportion.
    """
    total = sum(step.busy_s for step in steps)
    known = divided is not None and total > 0
    return {
        step.name: divided.busy * step.busy_s / total if divided is not None and known else None
        for step in steps
    }


def step_records(
    samples: Collection[Sample], images: int, divided: Shares | None
) -> list[dict[str, Any]]:
    """What the steps of a stage cost, as the report has them. `divided`: its actors' time."""
    steps = steps_of(samples)
    busy = busy_shares(divided, steps)

    def each(seconds: float | None) -> float | None:
        return None if seconds is None or not images else seconds / images

    return [
        {
            "name": step.name,
            "cpu_s_per_image": each(step.cpu_s),
            "busy_s_per_image": each(step.busy_s),
            "core_wait_s_per_image": each(step.core_wait_s),
            "bytes_in": step.bytes_in,
            "bytes_out": step.bytes_out,
            "busy": busy[step.name],
        }
        for step in steps
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One stage in one bucket of the timeline; None: no actor or no look at the pools told it."""

    t_s: float
    stage: str
    actors: int | None = None
    images_per_s: float | None = None
    cpu_cores: float | None = None
    rss_bytes: int | None = None
    private_bytes: int | None = None
    gpu_percent: float | None = None
    busy: float | None = None
    starved: float | None = None
    blocked: float | None = None
    queued: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleEvent:
    """A change of a stage's actors: of those asked for by `user` or `auto`, or, by `cluster`, of
    those that there is room for."""

    t_s: float
    stage: str
    before: int
    after: int
    by: str

    def json(self) -> dict[str, Any]:
        return {
            "t_s": self.t_s,
            "stage": self.stage,
            "from": self.before,
            "to": self.after,
            "by": self.by,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCpu:
    """CPU seconds of one node, all its cores, while actors measured there."""

    cpu_busy_s: float
    cpu_total_s: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that the collector knows when a run ends. `Snapshot()`: the collector was killed.

    `actors` and `first`: the latest and the first sample of each actor. `store_peak_bytes`: shared
    memory in use on all nodes at most, which is Ray's object store, counted once. `node_names`:
    the address of each node by its id, as far as known.
    """

    started: float = 0.0
    actors: tuple[Sample, ...] = ()
    first: tuple[Sample, ...] = ()
    pools: Mapping[str, PoolView] = field(default_factory=dict)
    rss_peak_by_stage: Mapping[str, int] = field(default_factory=dict)
    private_peak_by_stage: Mapping[str, int] = field(default_factory=dict)
    store_peak_bytes: int | None = None
    nodes: Mapping[str, NodeCpu] = field(default_factory=dict)
    node_names: Mapping[str, str] = field(default_factory=dict)
    timeline: tuple[Moment, ...] = ()
    scale_events: tuple[ScaleEvent, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which stage limits (None: none of them, or not known), why, and what a change would bring."""

    stage: str | None
    reason: str
    advice: tuple[Change, ...] = ()

    def json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "reason": self.reason,
            "advice": [asdict(change) for change in self.advice],
        }


@dataclass(frozen=True, kw_only=True)
class LiveStep:
    """One of several steps of a stage. `busy`: its part of the stage's."""

    name: str
    cpu_percent: float | None = None  # of all cores
    busy: float | None = None


@dataclass(frozen=True, kw_only=True)
class LiveStage:
    """A stage of a run that goes on. Rates and shares are of the last seconds; None: not known."""

    name: str
    actors: int
    pending: int
    draining: int
    wanted: int
    images: int
    queued: int
    rss_bytes: int | None = None
    private_bytes: int | None = None
    images_per_s: float | None = None
    cpu_percent: float | None = None  # of all cores
    gpu_percent: float | None = None
    busy: float | None = None
    starved: float | None = None
    blocked: float | None = None
    steps: tuple[LiveStep, ...] = ()  # of the last seconds; empty: not known


@dataclass(frozen=True, kw_only=True)
class LiveNode:
    """A node of the cluster. Rates are of the last seconds; None: not known.

    name: its address. actors: of each stage, those that were heard of lately.
    cpu_percent: of its cores, by whatever runs there. rss_bytes: of the actors.
    """

    name: str
    actors: Mapping[str, int]
    images_per_s: float | None
    cpu_percent: float | None
    rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """How a run goes. `cpu_percent` is the machine, of which `stages_cpu_percent` is the actors'
    and `other_cpu_percent` is what no stage used. None: not known.

    waiting: what the run waits for, a sentence; None: for nothing.
    nodes: those with actors, of a cluster of several; empty: one machine.
    """

    run_id: str
    at_s: float
    input: str
    output: str | None
    recipe: str
    backend: str
    images: int
    done: int
    rejected: int
    images_per_s: float | None
    eta_s: float | None
    cores: float
    cpu_percent: float | None
    stages_cpu_percent: float | None = None
    other_cpu_percent: float | None = None
    object_store_bytes: int | None = None
    actors_at_most: int
    auto: bool
    stages: tuple[LiveStage, ...]
    verdict: Verdict
    scale_events: tuple[ScaleEvent, ...]
    waiting: str | None = None
    nodes: tuple[LiveNode, ...] = ()

    def json(self) -> dict[str, Any]:
        """As JSON types: what `raypipe runs --json` prints and `Control.live` returns."""
        return asdict(self) | {
            "stages": [asdict(stage) for stage in self.stages],
            "verdict": self.verdict.json(),
            "scale_events": [event.json() for event in self.scale_events],
            "nodes": [asdict(node) for node in self.nodes],
        }


def unused(machine_percent: float | None, stages_percent: float | None) -> float | None:
    """CPU of the machine, in percent, that no stage used: Ray and the system."""
    if machine_percent is None or stages_percent is None:
        return None
    return max(machine_percent - stages_percent, 0.0)
