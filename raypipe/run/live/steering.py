"""How many actors each stage is to have: what is asked for, and what there is room for now.

A person or the planner asks. Where nodes come and go, the wanted counts are those that are asked
for, fitted into the room that there is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raypipe.insight import planner
from raypipe.insight.room import Room, fitted
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

    `asked`: actors of each stage that the run was asked for. `fixed`: workers beside them, whose
    count cannot change; they are in `at_most` too. `moves`: nodes come and go, so that
    `at_most`, `cores` and `gpus` hold for the begin alone. `left_out`: room that is for others.
    `grows`: an autoscaler adds nodes, up to `most` actors and `most_gpus` (None: not known).
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
    asked: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    moves: bool = False
    left_out: int = 0
    grows: bool = False
    most: int | None = None
    most_gpus: int | None = None

    @property
    def room(self) -> Room:
        """The room at the begin."""
        return Room(actors=self.at_most, cores=self.cores, gpus=self.gpus, memory=self.memory)


class Steering:
    """The counts that are asked for, those that are wanted now, and how they came about."""

    def __init__(self, facts: Facts, started: float):
        self._facts = facts
        self._started = self.settled_at = started
        self._by_hand: set[str] = set()
        self.room = facts.room
        self.unscalable = facts.unscalable
        self.asked: dict[str, int] = {}
        self.wanted: dict[str, int] = {}
        self.events: list[ScaleEvent] = []

    def begin(self, at: float) -> None:
        """The execution begins."""
        self._started = self.settled_at = at

    def seen(self, stage: str, pool: PoolView) -> None:
        """The execution has such a pool: its initial count is wanted until somebody changes it."""
        self.asked.setdefault(stage, self._facts.asked.get(stage, pool.start))
        self.wanted.setdefault(stage, pool.start)

    def resize(self, room: Room, now: float) -> None:
        """There is so much room now: fit the counts into it."""
        self.room = room
        self._want("cluster", now)

    @property
    def auto(self) -> set[str]:
        """The stages that the planner may change."""
        return set(self._facts.auto) - self._by_hand

    @property
    def most(self) -> Room:
        """The room that there may be, as far as known: with all nodes of the autoscaler."""
        if not self._facts.grows:
            return self.room
        more = max(self.room.actors, self._facts.most or 0)
        gpus = max(self.room.gpus, self._facts.most_gpus or 0)
        cores = self.room.cores + more - self.room.actors
        return Room(actors=more, cores=cores, gpus=gpus, memory=self.room.memory)

    def scale(self, counts: Mapping[str, int], now: float) -> dict[str, int] | str:
        """Set the actors of some stages for good: the planner leaves them alone from then on.

        Returns:
            All counts that are asked for; or the reason of a refusal, and nothing is changed.
        """
        counts, unknown = self._known(counts)
        if (refusal := unknown or self._refusal(counts)) is not None:
            return refusal
        self._by_hand |= set(counts)
        self._change(counts, "user", now)
        return self.asked

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
        if self.unscalable:
            return self.unscalable
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
        asked, most = {**self._facts.fixed, **self.asked, **counts}, self.most
        on_cpu, before = self._on_cpu(asked), self._on_cpu({**self._facts.fixed, **self.asked})
        unknown = self._facts.grows and self._facts.most is None
        # Fewer than before is never refused: nodes may have gone.
        if sum(on_cpu.values()) > max(most.actors, sum(before.values())) and not unknown:
            more = ", with all nodes that its autoscaler may add" if self._facts.grows else ""
            return (
                f"{_parts(on_cpu)} are {sum(on_cpu.values())} actors, but there is room for "
                f"{most.actors} (a CPU each on a cluster{more}, and memory for --actor-memory)"
            )
        memory = sum(count * self._facts.holds.get(stage, 0) for stage, count in on_cpu.items())
        if memory > most.memory:
            return (
                f"{_parts(on_cpu)} may take {memory / 1e9:.0f} GB of memory (--actor-memory, and "
                f"their libraries), but there are {most.memory / 1e9:.0f} GB"
            )
        on_gpu = {stage: count for stage, count in asked.items() if stage not in on_cpu}
        unknown = self._facts.grows and self._facts.most_gpus is None
        if sum(on_gpu.values()) > most.gpus and counts.keys() & on_gpu.keys() and not unknown:
            return f"{_parts(on_gpu)} take a GPU each, but there are {most.gpus}"
        return None

    def _on_cpu(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {stage: n for stage, n in counts.items() if stage not in self._facts.on_gpu}

    def _change(self, counts: Mapping[str, int], by: str, now: float) -> None:
        """Ask for other counts."""
        self._tell(self.asked, counts, by, now)
        self.asked = {**self.asked, **counts}
        self._want(None, now)
        self.settled_at = now + SETTLE_S

    def _want(self, by: str | None, now: float) -> None:
        """Fit what is asked for into the room. `by`: whose change that is; None: told already."""
        wanted = dict(self.asked)
        if self._facts.moves:
            fixed = self._facts.fixed
            asked = {**fixed, **self._facts.asked, **self.asked}
            counts = fitted(asked, self.room, on_gpu=self._facts.on_gpu, fixed=fixed)
            wanted = {stage: counts[stage] for stage in self.asked}
        if by is not None and wanted != self.wanted:
            self._tell(self.wanted, wanted, by, now)
            self.settled_at = now + SETTLE_S
        self.wanted = wanted

    def _tell(
        self, before: Mapping[str, int], after: Mapping[str, int], by: str, now: float
    ) -> None:
        at_s = max(now - self._started, 0.0)
        self.events += [
            ScaleEvent(t_s=at_s, stage=stage, before=before[stage], after=count, by=by)
            for stage, count in after.items()
            if count != before[stage]
        ]

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
        if self.unscalable or not self.auto or not pools:
            return
        if any(pool.done for pool in pools.values()):
            return
        if changing(pools):
            self.settled_at = now + SETTLE_S
        seen = costs(self.settled_at)
        if seen is None or left_s < WORTH_STARTING_S:
            return
        most = self.most
        machine = planner.Machine(
            cores=most.cores, actors=most.actors, memory=most.memory, gpus=most.gpus or None
        )
        fixed = {cost.name for cost in seen} - self.auto
        counts = planner.better(seen, machine, fixed=fixed) or {}
        changed = {stage: count for stage, count in counts.items() if stage in self.auto}
        if any(count != self.asked[stage] for stage, count in changed.items()):
            self._change(changed, "auto", now)


def changing(pools: Mapping[str, PoolView]) -> bool:
    """Whether actors start or go, or a stage has none."""
    return any(pool.pending or pool.draining or not pool.running for pool in pools.values())


def _parts(counts: Mapping[str, int]) -> str:
    return " + ".join(f"{count} {stage}" for stage, count in counts.items())
