"""The last seconds of a run: what "now" means for those who watch it and for the planner."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from raypipe.insight.planner import StageCost
from raypipe.insight.states import (
    Consumed,
    LiveStep,
    PoolView,
    Sample,
    Shares,
    StepTotals,
    busy_shares,
    shares,
    steps_of,
)

WINDOW_S = 5.0
"""What "now" is: long enough to even out shards of a second, short enough to follow a change."""

WINDOW_AT_MOST_S = 120.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one stage, all actors together, at one moment. `busy_s`, `core_wait_s`: finished calls."""

    at: float
    calls: int
    images: int
    busy_s: float
    core_wait_s: float | None
    cpu_s: float
    actor_s: float
    starved_s: float
    spent_s: float  # busy, calls under way included
    gpu_seen_s: float = 0.0
    gpu_busy_s: float = 0.0
    steps: tuple[StepTotals, ...] = ()


def of_actors(at: float, samples: Collection[Sample], pool: PoolView) -> Totals:
    """The totals of a stage, from the latest sample of each of its actors."""
    waits = [sample.core_wait_s for sample in samples if sample.core_wait_s is not None]
    return Totals(
        at=at,
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
        steps=steps_of(samples),
    )


def of_consumer(at: float, consumed: Consumed, pool: PoolView) -> Totals:
    """The totals of what takes the last blocks; each image counts as a call."""
    return Totals(
        at=at,
        calls=consumed.images,
        images=consumed.images,
        busy_s=consumed.busy_s,
        core_wait_s=None,
        cpu_s=consumed.cpu_s,
        actor_s=pool.actor_s,
        starved_s=pool.starved_s,
        spent_s=consumed.busy_s,
    )


@dataclass(frozen=True, slots=True)
class Window:
    """What a stage did between two moments."""

    first: Totals
    last: Totals

    @property
    def took_s(self) -> float:
        return self.last.at - self.first.at

    @property
    def images(self) -> int:
        return self.last.images - self.first.images

    @property
    def images_per_s(self) -> float:
        return self.images / self.took_s

    @property
    def cpu_cores(self) -> float:
        return (self.last.cpu_s - self.first.cpu_s) / self.took_s

    @property
    def gpu_percent(self) -> float | None:
        seen_s = self.last.gpu_seen_s - self.first.gpu_seen_s
        busy_s = self.last.gpu_busy_s - self.first.gpu_busy_s
        return 100 * busy_s / seen_s if seen_s > 0 else None

    def shares(self, *, last: bool) -> Shares | None:
        """How its actors' time divides. `last`: no stage follows."""
        actor_s = self.last.actor_s - self.first.actor_s
        if actor_s <= 0:
            return None
        return shares(
            busy_s=self.last.spent_s - self.first.spent_s,
            starved_s=self.last.starved_s - self.first.starved_s,
            actor_s=actor_s,
            last=last,
        )

    def steps(self, divided: Shares | None, cores: float) -> tuple[LiveStep, ...]:
        """What its steps did. `divided`: how its actors' time divides."""
        before = {step.name: step for step in self.first.steps}
        spent = [
            step.plus(before[step.name], -1) if step.name in before else step
            for step in self.last.steps
        ]
        busy = busy_shares(divided, spent)
        return tuple(
            LiveStep(
                name=step.name,
                cpu_percent=100 * step.cpu_s / self.took_s / cores,
                busy=busy[step.name],
            )
            for step in spent
        )

    def cost(self, name: str, *, actors: int, on_gpu: bool, fixed: bool) -> StageCost:
        """What an image cost the stage."""
        first, last, images = self.first, self.last, self.images
        waited_s = None
        if first.core_wait_s is not None and last.core_wait_s is not None:
            waited_s = (last.core_wait_s - first.core_wait_s) / images
        return StageCost(
            name=name,
            actors=actors,
            busy_s=(last.busy_s - first.busy_s) / images,
            cpu_s=(last.cpu_s - first.cpu_s) / images,
            core_wait_s=waited_s,
            on_gpu=on_gpu,
            fixed=fixed,
        )


class Recent:
    """The totals of each stage, and the CPU of each node, over the last minutes."""

    def __init__(self) -> None:
        self._stages: dict[str, deque[Totals]] = {}
        self._machine: deque[tuple[float, dict[str, tuple[float, float]]]] = deque()

    def remember(self, stage: str, totals: Totals) -> None:
        recent = self._stages.setdefault(stage, deque())
        recent.append(totals)
        while len(recent) > 2 and recent[1].at < totals.at - WINDOW_AT_MOST_S:
            recent.popleft()

    def window(self, stage: str, *, calls: int = 0, since: float = 0.0) -> Window | None:
        """The last WINDOW_S seconds of a stage, or as many as it takes for so many calls, but none
        before `since`; None: there is not so much yet."""
        recent = [totals for totals in self._stages.get(stage, ()) if totals.at >= since]
        if len(recent) < 2:
            return None
        last = recent[-1]
        for first in reversed(recent[:-1]):
            if last.at - first.at >= WINDOW_S and last.calls - first.calls >= calls:
                return Window(first, last)
        return Window(recent[0], last) if last.calls - recent[0].calls >= calls else None

    def remember_machine(self, at: float, samples: Iterable[Sample]) -> None:
        """Keep what the latest sample of each node says of its CPU."""
        newest: dict[str, Sample] = {}
        for sample in samples:
            if sample.node not in newest or newest[sample.node].at < sample.at:
                newest[sample.node] = sample
        nodes = {n: (s.node_cpu_busy_s, s.node_cpu_total_s) for n, s in newest.items()}
        self._machine.append((at, nodes))
        while len(self._machine) > 2 and self._machine[1][0] < at - WINDOW_S:
            self._machine.popleft()

    def machine_percent(self) -> float | None:
        """Mean use of all cores of the nodes with actors of late, 0 to 100; None: not known."""
        used = self._used()
        busy, total = (sum(part) for part in zip(*used.values(), strict=True)) if used else (0, 0)
        return 100 * busy / total if total > 0 else None

    def node_percents(self) -> dict[str, float]:
        """The same of each node that is known."""
        return {
            node: 100 * busy / total for node, (busy, total) in self._used().items() if total > 0
        }

    def _used(self) -> dict[str, tuple[float, float]]:
        """CPU seconds of each node of late: busy, and in all."""
        if len(self._machine) < 2:
            return {}
        before, now = self._machine[0][1], self._machine[-1][1]
        return {
            node: (now[node][0] - before[node][0], now[node][1] - before[node][1])
            for node in now
            if node in before
        }


def pools_without(
    pools: Mapping[str, PoolView],
    latest: Mapping[str, Sample],
    first: Mapping[str, Sample],
    before: Mapping[str, PoolView],
    there: Collection[str],
) -> dict[str, PoolView]:
    """Stages that are in no pool of the execution, whose actors take their input by themselves.

    Ray Data knows nothing of training workers.

    Args:
        pools: those that the execution sees.
        latest: of each actor, as is `first`.
        before: what was returned last time.
        there: the actors that were heard of lately.
    """
    found: dict[str, PoolView] = {}
    for actor, sample in latest.items():
        if sample.stage in pools or sample.starved_s is None:
            continue
        view = found.get(sample.stage, PoolView())
        running = view.running + (actor in there)
        earlier = before.get(sample.stage)
        found[sample.stage] = PoolView(
            start=earlier.start if earlier else running,
            end=running,
            running=running,
            actor_s=view.actor_s + sample.at - first[actor].at,
            starved_s=view.starved_s + sample.starved_s,
        )
    return found
