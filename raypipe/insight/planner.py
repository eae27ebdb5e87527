"""From what the stages cost to which one limits, what a change would bring, and how many actors each should have.

Stage i needs b_i busy seconds and u_i CPU seconds an image. With c_i actors on C cores:

    throughput = min( min_i c_i / b_i , C / (o + sum_i u_i) )     images/s

less what is lost near the point where both bounds meet: actors that wait most of the time do not take turns at the cores, but now and then
all want them at once (`_rate`).

A run reaches of it what its limiting stage is busy of the time: Ray hands out work ten times a second, so that actors wait for it (`_reached`).

o is the CPU that Ray itself spends on an image, where it was measured; a stage that trains has a GPU for each of its actors. Busy seconds
contain waiting for a disk or a network, which more actors do side by side; waiting for a core is taken off, for more actors only make it
longer (`uncontended`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CORES = "cores"
"""What `bound` calls the machine's cores when no single stage's actors limit, but all of them together."""

ENOUGH = 0.95
"""Stages are given actors until the model's throughput is this near to what the cores allow: the rest is noise."""

LEAST_REACHED = 0.9
"""Of the model's throughput; a run in which less was reached was too short, or its input too slow, to tell."""

RAYS_SHARE = 0.3
"""Of the stages' own CPU: so much more may be that of Ray's own processes."""

RAYS_CORES = 0.3
"""Cores that those may take besides, however little the stages do (measured: 0.25, preprocess actors waiting for one slow writer)."""

END_S = 1.5
"""CPU seconds that the end of an actor may take, while Python and the libraries take themselves down (measured: 0.3 with OpenCV, 1.3 with torchvision)."""

TOLD = 10.0
"""Percent of all cores that other programs may hold before it is said: less changes no conclusion."""

WORTH = 1.05
"""A running pool is changed when the model expects at least this ratio: less is within the noise of what stages cost."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one image costs a stage, and how many actors it has.

    `core_wait_s` is part of `busy_s`; None: not known. `on_gpu`: each of its actors holds a GPU.
    `fixed`: its count cannot change, and it takes none of the room for actors, because it is the
    caller's own loop (`states.CONSUME`).
    """

    name: str
    actors: int
    busy_s: float
    cpu_s: float
    core_wait_s: float | None = None
    on_gpu: bool = False
    fixed: bool = False


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the stages run on. `cores` they share; `actors`: room for so many, those on GPUs not counted; `gpus`: None, those in use;
    `overhead_s`: CPU seconds of Ray itself, an image; `reached`: share of the model's throughput that a run reaches."""

    cores: float
    actors: int = 0
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
    # Where actors are enough, and also in a tie, it is the cores: "more actors" would be bad advice.
    by_actors = min(
        (stage.actors / stage.busy_s for stage in stages if stage.busy_s > 0), default=math.inf
    )
    return machine.reached * rate, slowest if by_actors < at_most else CORES


def _rate(stage: StageCost, actors: int, at_most: float) -> float:
    """Images/s of a stage whose actors share cores that allow `at_most`.

    An image keeps an actor waiting for busy_s - cpu_s and then needs a core for cpu_s, or queues for it: the finite-source queue M/M/c//N (Kleinrock,
    Queueing Systems I, 3.8), c being the cores' share for this stage, at_most * cpu_s, at least one. Without waiting, or with no more actors
    than that, it is the plain bound.
    """
    cores = max(at_most * stage.cpu_s, 1.0)
    waits_s = stage.busy_s - stage.cpu_s
    if actors <= cores or waits_s <= 0 or not stage.cpu_s:
        return min(actors / stage.busy_s, at_most)
    # weight: how likely it is that so many of the actors want a core, relative to all other numbers of them.
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
    """`stages` with busy seconds less what is spent waiting for a core: what an image would take on a free one.

    Where that is not measured and the actors' CPU seconds fill the cores, contention can explain all of the waiting, and is taken to:
    the measurement then says no more than that.
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


def best(
    stages: Sequence[StageCost],
    machine: Machine,
    *,
    fixed: Collection[str] = (),
    images: float = math.inf,
    start_s: float = 0.0,
) -> dict[str, int]:
    """The fewest actors of each stage that reach the model's highest throughput; or, with `images`, that are done with these soonest.

    Args:
        stages: their costs (`uncontended`); the counts they have matter for `fixed` ones only.
        fixed: stages whose count stays as it is.
        images: how many there are to do.
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
        on_cpu = sum(count for name, count in counts.items() if name not in on_gpu | alone)
        full = (
            counts[slowest] >= (machine.gpus or 0)
            if slowest in on_gpu
            else on_cpu >= machine.actors
        )
        if math.isinf(rate) or rate >= ENOUGH * at_most or slowest in kept or full:
            return min(found, key=lambda pair: pair[0])[1]
        counts[slowest] += 1


def better(
    stages: Sequence[StageCost], machine: Machine, *, fixed: Collection[str] = ()
) -> dict[str, int] | None:
    """Counts that are worth changing to, by the costs as measured with those there are; None: what there is will do.

    Stages that must give some up for others do; actors that only wait are left alone, as they cost memory and no time.
    """
    free = uncontended(stages, machine.cores)
    now, _ = bound(free, machine)
    counts = best(free, machine, fixed=fixed)
    then, _ = bound(with_actors(free, counts), machine)
    if not now or then < WORTH * now:
        return None
    most = {stage.name: max(counts[stage.name], stage.actors) for stage in free}
    return (
        most
        if sum(most[stage.name] for stage in free if not (stage.on_gpu or stage.fixed))
        <= machine.actors
        else counts
    )


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something a user can do, and the throughput the model expects of it."""

    change: str
    predicted_images_per_s: float


def changes(stages: Sequence[StageCost], machine: Machine, measured: float) -> list[Change]:
    """What one more actor of each stage, and one more core, would bring; best first.

    The model gives the ratio; `measured` images/s anchors it, so what the model leaves out does not show as gain.
    """
    base = uncontended(stages, machine.cores)
    now, _ = bound(base, machine)
    if not now or not measured:
        return []
    options = [
        (
            f"{stage.name} {'workers' if stage.on_gpu else 'actors'} {stage.actors} -> {stage.actors + 1}{', with a GPU more' if stage.on_gpu else ''}",
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
    for change in found:  # what costs more and brings no more is no advice
        if all(
            abs(change.predicted_images_per_s / other.predicted_images_per_s - 1) > 0.02
            for other in distinct
        ):
            distinct.append(change)
    return sorted(distinct, key=lambda change: -change.predicted_images_per_s)


def held_by_others(busy_percent: float, own_cores: float, cores: float) -> float:
    """Percent of all cores that programs other than the run held, at least: what may be Ray's is not among it.

    Args:
        busy_percent: of all cores, by whatever ran, 0 to 100.
        own_cores: cores that the stages themselves used meanwhile, the end of their actors included (END_S each).
    """
    return max(busy_percent - 100 * (own_cores * (1 + RAYS_SHARE) + RAYS_CORES) / cores, 0.0)


def costs_of(stages: Sequence[Mapping[str, Any]]) -> list[StageCost]:
    """What a report's stages cost as measured, with the actors that they had at the end; those that have finished no shard are left out."""
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
    """What a report says of its stages (`uncontended`, with the actors that they had at the end) and of the machine.

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
    """How busy what limits was, 0 to 1."""
    if limit == CORES:
        busy = (report.get("work_cpu_percent") or 100.0) / 100
    else:
        busy = (
            next(stage.get("busy") for stage in report["stages"] if stage["name"] == limit) or 1.0
        )
    return min(max(busy, LEAST_REACHED), 1.0)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run would be on a machine. Rates are images/s; `gains`: what one more of something would bring, and the rate then."""

    machine: Machine
    counts: dict[str, int]
    images_per_s: float
    limit: str
    gains: tuple[tuple[str, float], ...]


def outlook(
    stages: Sequence[StageCost], machine: Machine, counts: Mapping[str, int] | None = None
) -> Outlook:
    """The best allocation on `machine` (or `counts`), its throughput and limit, and what one more actor, core or GPU would bring.

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
    """The two designs of a training, in seconds: preprocess in every epoch while training (`continuous_s` an epoch), or once into a store
    (`once_s`) and train from there (`stored_s` an epoch)."""

    once_s: float
    continuous_s: float
    stored_s: float

    @property
    def break_even_epochs(self) -> float | None:
        """From how many epochs on storing takes less time in all; None: never, as an epoch from the store saves less than 2%, within the
        noise of what stages cost."""
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
    """What both designs would take by the model.

    Args:
        images: an epoch.
        preprocess: of the source, with its actors.
        write: of what preprocessing made; its actors are chosen.
        stored: preprocessing what was written; as many actors as `preprocess` has.
        train: with its workers; None: whatever takes the images is fast enough.
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
