"""The model: from what stages cost to which limits, what a change brings, and how many actors.

Stage i needs b_i busy seconds and u_i CPU seconds an image. With c_i actors on C cores:

    throughput = min( min_i c_i / b_i , C / (o + sum_i u_i) )     images/s

o is the CPU that Ray itself spends on an image, where it was measured. Near the point where both
bounds meet some is lost: actors that mostly wait do not take turns at the cores, but now and then
all want one at once (`_rate`). A run reaches the share of it in which its limiting stage is busy:
Ray hands out work ten times a second, and actors wait for that (`_reached`).

Busy seconds contain waiting for a disk or a network, which more actors do side by side. Waiting
for a core is subtracted, because more actors only make it longer (`uncontended`). A stage that
trains has a GPU for each of its actors.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CORES = "cores"
"""What `bound` returns where the cores limit, and not the actors of one stage."""

ENOUGH = 0.95
"""Stages get actors until the model's throughput is this near to what the cores allow."""

LEAST_REACHED = 0.9
"""Of the model's throughput; a run that reached less was too short, or its input too slow."""

RAYS_SHARE = 0.3
"""So much of the stages' own CPU may be that of Ray's own processes besides."""

RAYS_CORES = 0.3
"""Cores that Ray may take however little the stages do (measured: 0.25, with one slow writer)."""

END_S = 1.5
"""CPU seconds in which Python and libraries end (measured: 0.3 with OpenCV, 1.3 torchvision)."""

TOLD = 10.0
"""Other programs are mentioned above this percent of all cores: less changes no conclusion."""

WORTH = 1.05
"""A pool is resized where the model expects at least this ratio: less is within the noise."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one image costs a stage, and how many actors it has.

    `core_wait_s` is part of `busy_s`; None: not known. `on_gpu`: each of its actors holds a GPU.
    `fixed`: its count cannot change, and it takes none of the room for actors, because it is the
    caller's own loop (`states.CONSUME`). `holds`: bytes of memory that one of its actors may take.
    `out_bytes`: bytes an image that it hands on; 0: few.
    """

    name: str
    actors: int
    busy_s: float
    cpu_s: float
    core_wait_s: float | None = None
    on_gpu: bool = False
    fixed: bool = False
    holds: float = 0.0
    out_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the stages run on.

    `cores`: shared by all. `actors`: room for so many, those on GPUs not counted. `memory`: bytes
    that actors may take (`StageCost.holds`), those on GPUs not counted. `gpus`: None,
    those in use. `overhead_s`: CPU seconds of Ray itself, an image. `reached`: the share of the
    model's throughput that a run reaches.
    """

    cores: float
    actors: int = 0
    memory: float = math.inf
    gpus: int | None = None
    overhead_s: float = 0.0
    reached: float = 1.0


def bound(stages: Sequence[StageCost], machine: Machine) -> tuple[float, str]:
    """The model's throughput in images/s, and what limits it: a stage's name, or CORES."""
    at_most = _by_cores(stages, machine)
    bounds = [
        (_rate(stage, stage.actors, at_most), stage.name) for stage in stages if stage.busy_s > 0
    ]
    rate, slowest = min(bounds, default=(0.0, CORES))
    # With enough actors, and in a tie, the cores limit: "more actors" would be bad advice.
    by_actors = min(
        (stage.actors / stage.busy_s for stage in stages if stage.busy_s > 0), default=math.inf
    )
    return machine.reached * rate, slowest if by_actors < at_most else CORES


def _rate(stage: StageCost, actors: int, at_most: float) -> float:
    """Images/s of a stage whose actors share cores that allow `at_most`.

    An image keeps an actor waiting for busy_s - cpu_s, then needs a core for cpu_s or queues for
    it. That is the finite-source queue M/M/c//N (Kleinrock, Queueing Systems I, 3.8). c is this
    stage's share of the cores, at_most * cpu_s, at least one. Without waiting, or with no more
    actors than c, it is the plain bound.
    """
    cores = max(at_most * stage.cpu_s, 1.0)
    waits_s = stage.busy_s - stage.cpu_s
    if actors <= cores or waits_s <= 0 or not stage.cpu_s:
        return min(actors / stage.busy_s, at_most)
    # weight: how likely so many of the actors want a core, relative to other numbers of them.
    weight = total = 1.0
    served = 0.0
    for wanting in range(1, actors + 1):
        weight *= (actors - wanting + 1) / waits_s * stage.cpu_s / min(wanting, cores)
        total += weight
        served += weight * min(wanting, cores)
        if total > 1e100:
            weight, total, served = weight / total, 1.0, served / total
    return min(served / total / stage.cpu_s, at_most)


def _by_cores(stages: Sequence[StageCost], machine: Machine) -> float:
    cpu_s = sum(stage.cpu_s for stage in stages) + machine.overhead_s
    return machine.cores / cpu_s if cpu_s > 0 else math.inf


def with_actors(stages: Sequence[StageCost], counts: Mapping[str, int]) -> list[StageCost]:
    """`stages` with other numbers of actors."""
    return [replace(stage, actors=counts[stage.name]) for stage in stages]


def uncontended(stages: Sequence[StageCost], cores: float) -> list[StageCost]:
    """`stages` with busy seconds less the waiting for a core: what an image takes on a free one.

    Where that waiting was not measured and the actors' CPU seconds fill the cores, contention can
    explain all of the waiting, and is assumed to.
    """
    rate = min((stage.actors / stage.busy_s for stage in stages if stage.busy_s > 0), default=0.0)
    full = bool(cores) and rate * sum(stage.cpu_s for stage in stages) / cores >= 0.9

    def free(stage: StageCost) -> float:
        if stage.core_wait_s is not None:
            return stage.busy_s - stage.core_wait_s
        return min(stage.cpu_s, stage.busy_s) if full else stage.busy_s

    return [
        replace(stage, busy_s=max(free(stage), 1e-9) if stage.busy_s > 0 else 0.0, core_wait_s=None)
        for stage in stages
    ]


def fits(stages: Sequence[StageCost], counts: Mapping[str, int], machine: Machine) -> bool:
    """Whether the machine has room for so many actors: those that take CPUs and memory."""
    on_cpu = [stage for stage in stages if not (stage.on_gpu or stage.fixed)]
    actors = sum(counts[stage.name] for stage in on_cpu)
    memory = sum(counts[stage.name] * stage.holds for stage in on_cpu)
    return actors <= machine.actors and memory <= machine.memory


def best(
    stages: Sequence[StageCost],
    machine: Machine,
    *,
    fixed: Collection[str] = (),
    images: float = math.inf,
    start_s: float = 0.0,
) -> dict[str, int]:
    """The fewest actors of each stage that reach the highest throughput.

    Args:
        stages: their costs (`uncontended`). Their counts matter only for `fixed` ones.
        fixed: stages whose count stays as it is.
        images: how many there are to do: the counts that are done with these first.
        start_s: CPU seconds that starting an actor costs.
    """
    on_gpu = {stage.name for stage in stages if stage.on_gpu}
    alone = {stage.name for stage in stages if stage.fixed}
    kept = set(fixed) | alone | (on_gpu if machine.gpus is None else set())
    counts = {stage.name: stage.actors if stage.name in kept else 1 for stage in stages}
    at_most = _by_cores(stages, machine)
    found: list[tuple[float, dict[str, int]]] = []
    while True:
        rates = [
            (_rate(stage, counts[stage.name], at_most), stage.name)
            for stage in stages
            if stage.busy_s > 0
        ]
        rate, slowest = min(rates, default=(math.inf, ""))
        took_s = (
            images / min(rate, at_most) + sum(counts.values()) * start_s / machine.cores
            if images < math.inf
            else -rate
        )
        found.append((took_s, dict(counts)))
        full = bool(slowest) and (
            counts[slowest] >= (machine.gpus or 0)
            if slowest in on_gpu
            else not fits(stages, counts | {slowest: counts[slowest] + 1}, machine)
        )
        if math.isinf(rate) or rate >= ENOUGH * at_most or slowest in kept or full:
            return min(found, key=lambda pair: pair[0])[1]
        counts[slowest] += 1


def better(
    stages: Sequence[StageCost], machine: Machine, *, fixed: Collection[str] = ()
) -> dict[str, int] | None:
    """Counts that are worth changing to, by costs measured with the present ones; None: none are.

    Stages give up actors only where others need the room. Actors that only wait stay: they cost
    memory and no time.
    """
    free = uncontended(stages, machine.cores)
    now, _ = bound(free, machine)
    counts = best(free, machine, fixed=fixed)
    then, _ = bound(with_actors(free, counts), machine)
    if not now or then < WORTH * now:
        return None
    most = {stage.name: max(counts[stage.name], stage.actors) for stage in free}
    return most if fits(free, most, machine) else counts


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that a user can do, and the throughput that the model expects of it."""

    change: str
    predicted_images_per_s: float


def changes(stages: Sequence[StageCost], machine: Machine, measured: float) -> list[Change]:
    """What one more actor of each stage, and one more core, would bring; best first.

    The model gives the ratio and `measured` (images/s) the base, so that what the model leaves out
    does not look like a gain.
    """
    base = uncontended(stages, machine.cores)
    now, _ = bound(base, machine)
    if not now or not measured:
        return []
    options = [
        (
            f"{stage.name} {'workers' if stage.on_gpu else 'actors'} "
            f"{stage.actors} -> {stage.actors + 1}{', with a GPU more' if stage.on_gpu else ''}",
            [replace(s, actors=s.actors + (s is stage)) for s in base],
            machine,
        )
        for stage in base
        if not stage.fixed
    ]
    wider = replace(machine, cores=machine.cores + 1)
    cores = f"cores {machine.cores:g} -> {wider.cores:g}"
    options.append((cores, base, wider))
    options.append(
        (
            f"{cores} and an actor more of each stage",
            [s if s.fixed else replace(s, actors=s.actors + 1) for s in base],
            wider,
        )
    )
    found = [
        Change(change=text, predicted_images_per_s=measured * bound(then, on)[0] / now)
        for text, then, on in options
    ]
    distinct: list[Change] = []
    for change in found:  # a change that brings no more than another is no advice
        if all(
            abs(change.predicted_images_per_s / other.predicted_images_per_s - 1) > 0.02
            for other in distinct
        ):
            distinct.append(change)
    return sorted(distinct, key=lambda change: -change.predicted_images_per_s)


def held_by_others(busy_percent: float, own_cores: float, cores: float) -> float:
    """Percent of all cores that other programs held, at least: what may be Ray's is not in it.

    Args:
        busy_percent: of all cores, by whatever ran, 0 to 100.
        own_cores: cores that the stages used meanwhile, with the end of their actors (END_S each).
    """
    return max(busy_percent - 100 * (own_cores * (1 + RAYS_SHARE) + RAYS_CORES) / cores, 0.0)


def costs_of(stages: Sequence[Mapping[str, Any]]) -> list[StageCost]:
    """What a report's stages cost as measured, with the actors that they had at the end.

    Stages that finished no shard are left out.
    """
    return [
        StageCost(
            name=stage["name"],
            actors=stage["actors"]["end"] or stage["actors"]["max"],
            busy_s=stage["busy_s_per_image"],
            cpu_s=stage["cpu_s_per_image"],
            core_wait_s=stage.get("core_wait_s_per_image"),
            on_gpu=bool(stage.get("on_gpu")),
            fixed=bool(stage.get("fixed")),
        )
        for stage in stages
        if stage["busy_s_per_image"] and stage["actors"]["max"]
    ]


def of_report(report: Mapping[str, Any]) -> tuple[list[StageCost], Machine]:
    """What a report says of its stages (`costs_of`, `uncontended`) and of the machine.

    Raises:
        ValueError: no stage has finished a shard, so nothing is known of what it costs.
    """
    costs = costs_of(report["stages"])
    if not costs:
        raise ValueError(
            "no stage has finished a shard, so nothing is known of what an image costs"
        )
    cores = report["hardware"]["cores"]
    machine = Machine(
        cores=cores,
        actors=sum(cost.actors for cost in costs if not (cost.on_gpu or cost.fixed)),
        gpus=sum(cost.actors for cost in costs if cost.on_gpu) or None,
        overhead_s=report.get("overhead_cpu_s_per_image") or 0.0,
    )
    free = uncontended(costs, cores)
    return free, replace(machine, reached=_reached(report, bound(free, machine)[1]))


def _reached(report: Mapping[str, Any], limit: str) -> float:
    """How busy the limiting stage was, 0 to 1."""
    if limit == CORES:
        busy = (report.get("work_cpu_percent") or 100.0) / 100
    else:
        busy = (
            next(stage.get("busy") for stage in report["stages"] if stage["name"] == limit) or 1.0
        )
    return min(max(busy, LEAST_REACHED), 1.0)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A run on a machine. Rates are images/s; `gains`: one more of something, and the rate then."""

    machine: Machine
    counts: dict[str, int]
    images_per_s: float
    limit: str
    gains: tuple[tuple[str, float], ...]


def outlook(
    stages: Sequence[StageCost], machine: Machine, counts: Mapping[str, int] | None = None
) -> Outlook:
    """The best allocation on `machine` (or `counts`), and what one more of anything would bring.

    Args:
        stages: their costs (`uncontended`).
    """
    chosen = dict(counts or best(stages, machine))

    def rate(then: Mapping[str, int], on: Machine) -> float:
        return bound(with_actors(stages, then), on)[0]

    images_per_s, limit = bound(with_actors(stages, chosen), machine)
    gains = []
    for stage in stages:
        if stage.fixed:
            continue
        what = f"one more {stage.name} {'worker, with its GPU' if stage.on_gpu else 'actor'}"
        gains.append((what, rate(chosen | {stage.name: chosen[stage.name] + 1}, machine)))
    wider = replace(machine, cores=machine.cores + 1, actors=machine.actors + 1)
    gains.append(("one more core, and the best actors for it", rate(best(stages, wider), wider)))
    if machine.gpus is not None and any(stage.on_gpu for stage in stages):
        richer = replace(machine, gpus=machine.gpus + 1)
        gains.append(
            ("one more GPU, and the best actors for it", rate(best(stages, richer), richer))
        )
    return Outlook(
        machine=machine, counts=chosen, images_per_s=images_per_s, limit=limit, gains=tuple(gains)
    )


@dataclass(frozen=True, kw_only=True)
class Designs:
    """The two designs of a training, in seconds.

    Preprocess in every epoch while training (`continuous_s` an epoch); or once into a store
    (`once_s`), and train from there (`stored_s` an epoch).
    """

    once_s: float
    continuous_s: float
    stored_s: float

    @property
    def break_even_epochs(self) -> float | None:
        """From how many epochs on storing takes less time in all.

        None: never, because an epoch from the store saves less than 2%, which is within the noise.
        """
        saved = self.continuous_s - self.stored_s
        return self.once_s / saved if saved > 0.02 * self.continuous_s else None


def designs(
    *,
    images: int,
    preprocess: StageCost,
    write: StageCost,
    stored: StageCost,
    machine: Machine,
    train: StageCost | None = None,
) -> Designs:
    """What both designs take by the model.

    Args:
        images: an epoch.
        preprocess: of the source, with its actors.
        write: storing what preprocessing made; its actors are chosen.
        stored: preprocessing what was written, with as many actors as `preprocess`.
        train: with its workers; None: training is never the slowest.
    """
    trains = [train] if train is not None else []
    first = [preprocess, write]
    counts = best(
        first,
        replace(machine, actors=max(machine.actors, preprocess.actors + 1)),
        fixed={preprocess.name},
    )

    def seconds(stages: Sequence[StageCost]) -> float:
        return images / bound(stages, machine)[0]

    return Designs(
        once_s=seconds(with_actors(first, counts)),
        continuous_s=seconds([preprocess, *trains]),
        stored_s=seconds([replace(stored, actors=preprocess.actors), *trains]),
    )
