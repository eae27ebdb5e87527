"""How many actors each stage is to have: what a person asked for, and what the planner changes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raypipe.insight import planner
from raypipe.insight.states import PoolView, ScaleEvent

SETTLE_S = 2.0
"""How long costs are left alone after a change has taken effect."""

WORTH_STARTING_S = 8.0
"""With less than this left to do, new actors would hardly be ready before the end."""

CALLS_PER_ACTOR = 2
"""The planner waits for so many calls of each actor in the window: one call may be an odd one."""


NOT_BEGUN = "the run has not begun yet; try again when its first actors start"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run when its execution begins.

    `at_most`: actors of all stages together that Ray has logical CPUs for, those on GPUs not
    counted. `auto`: stages whose count the planner may change. `on_gpu`: stages each of whose
    actors holds one of the `gpus`. `memory`: bytes that the others may take together, of which an
    actor of a stage `holds` so many at most. `workers`: the stage of a training's workers.
    """

    input: str = ""
    output: str | None = None
    recipe: str = ""
    backend: str = ""
    images: int = 0
    cores: float = 1.0
    at_most: int = 1
    auto: tuple[str, ...] = ()
    memory: float = math.inf
    holds: Mapping[str, int] = field(default_factory=dict)
    on_gpu: tuple[str, ...] = ()
    gpus: int = 0
    workers: str = ""
    unscalable: str = ""  # why actor counts cannot be changed; empty: they can


class Steering:
    """The wanted counts of a run, and how they came about."""

    def __init__(self, facts: Facts, started: float):
        self._facts = facts
        self._started = self.settled_at = started
        self._by_hand: set[str] = set()
        self.wanted: dict[str, int] = {}
        self.events: list[ScaleEvent] = []

    def begin(self, at: float) -> None:
        """The execution begins."""
        self._started = self.settled_at = at

    def seen(self, stage: str, pool: PoolView) -> None:
        """The execution has such a pool: its initial count is wanted until somebody changes it."""
        self.wanted.setdefault(stage, pool.start)

    @property
    def auto(self) -> set[str]:
        """The stages that the planner may change."""
        return set(self._facts.auto) - self._by_hand

    def scale(self, counts: Mapping[str, int], now: float) -> dict[str, int] | str:
        """Set the actors of some stages for good: the planner leaves them alone from then on.

        Returns:
            All wanted counts; or the reason of a refusal, and nothing is changed.
        """
        counts, unknown = self._known(counts)
        if (refusal := unknown or self._refusal(counts)) is not None:
            return refusal
        self._by_hand |= set(counts)
        self._change(counts, "user", now)
        return self.wanted

    def _known(self, counts: Mapping[str, int]) -> tuple[dict[str, int], str | None]:
        """The counts by the names of this run's stages, and why one cannot be set.

        A stage of several steps may be named by its first: it has the actors of that.
        """
        found: dict[str, int] = {}
        for asked, count in counts.items():
            stage = next(
                (name for name in self.wanted if asked in (name, name.split("+")[0])), asked
            )
            if stage in found:
                return {}, f"{stage} is given twice, as {found[stage]} and as {count}"
            for name in self.wanted:
                first, *others = name.split("+")
                if asked in others:
                    return {}, (
                        f"in this run {first} actors {asked} too, and it is fixed for a run: "
                        f"{asked} has no actors of its own. Scale {first}, or start again with "
                        f"--writers N"
                    )
            found[stage] = count
        return found, None

    def _refusal(self, counts: Mapping[str, int]) -> str | None:
        if self._facts.unscalable:
            return self._facts.unscalable
        if not self.wanted:
            return NOT_BEGUN
        for stage, count in counts.items():
            if stage not in self.wanted:
                stages = ", ".join(self.wanted)
                if stage != self._facts.workers:
                    return f"this run has no stage {stage!r}; its stages are {stages}"
                return (
                    f"the workers of {stage} are fixed for a run; what can be scaled is {stages}. "
                    f"End it and start it again with --workers {count}: it goes on from its last "
                    "checkpoint"
                )
            if count < 1:
                return "a stage needs at least 1 actor"
        wanted = {**self.wanted, **counts}
        on_gpu = {stage: count for stage, count in wanted.items() if stage in self._facts.on_gpu}
        on_cpu = {stage: count for stage, count in wanted.items() if stage not in on_gpu}
        if sum(on_cpu.values()) > self._facts.at_most:
            return (
                f"{_parts(on_cpu)} are {sum(on_cpu.values())} actors, but there is room for "
                f"{self._facts.at_most} (a CPU each on a cluster, and memory for --actor-memory)"
            )
        memory = sum(count * self._facts.holds.get(stage, 0) for stage, count in on_cpu.items())
        if memory > self._facts.memory:
            return (
                f"{_parts(on_cpu)} may take {memory / 1e9:.0f} GB of memory (--actor-memory, and "
                f"their libraries), but there are {self._facts.memory / 1e9:.0f} GB"
            )
        if sum(on_gpu.values()) > self._facts.gpus:
            return f"{_parts(on_gpu)} take a GPU each, but there are {self._facts.gpus}"
        return None

    def _change(self, counts: Mapping[str, int], by: str, now: float) -> None:
        for stage, count in counts.items():
            if count != self.wanted[stage]:
                at_s = max(now - self._started, 0.0)
                event = ScaleEvent(
                    t_s=at_s, stage=stage, before=self.wanted[stage], after=count, by=by
                )
                self.events.append(event)
        self.wanted = {**self.wanted, **counts}
        self.settled_at = now + SETTLE_S

    def steer(
        self,
        now: float,
        pools: Mapping[str, PoolView],
        costs: Callable[[float], Sequence[planner.StageCost] | None],
        left_s: float,
    ) -> None:
        """Let the planner change what it may, once the last change has taken effect and enough was
        seen since.

        Args:
            costs: what an image has cost each stage since a moment; None: too little was seen.
            left_s: seconds that the run will take, by its rate of now.
        """
        if not self.auto or not pools or any(pool.done for pool in pools.values()):
            return
        if changing(pools):
            self.settled_at = now + SETTLE_S
        seen = costs(self.settled_at)
        if seen is None or left_s < WORTH_STARTING_S:
            return
        machine = planner.Machine(
            cores=self._facts.cores,
            actors=self._facts.at_most,
            memory=self._facts.memory,
            gpus=self._facts.gpus or None,
        )
        fixed = {cost.name for cost in seen} - self.auto
        counts = planner.better(seen, machine, fixed=fixed)
        if counts is not None:
            self._change({s: n for s, n in counts.items() if s in self.wanted}, "auto", now)


def changing(pools: Mapping[str, PoolView]) -> bool:
    """Whether actors start or go, or a stage has none."""
    return any(pool.pending or pool.draining or not pool.running for pool in pools.values())


def _parts(counts: Mapping[str, int]) -> str:
    return " + ".join(f"{count} {stage}" for stage, count in counts.items())
