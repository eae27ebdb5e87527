"""From what the stages cost to which one limits, what a change would bring, and how many actors each should have.

Stage i needs b_i busy seconds and u_i CPU seconds an image. With c_i actors on C cores:

    throughput = min( min_i c_i / b_i , C / sum_i u_i )     images/s

Busy seconds contain waiting for a disk or a network, which more actors do side by side; waiting for a core is taken off, for more actors
only make it longer (`uncontended`).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

CORES = "cores"
"""What `bound` calls the machine's cores when no single stage's actors limit, but all of them together."""

ENOUGH = 0.95
"""Stages are given actors until the model's throughput is this near to what the cores allow: the rest is noise."""

WORTH = 1.1
"""A running pool is changed when the model expects at least this ratio: less is within the noise of what stages cost."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one image costs a stage, and how many actors it has. `core_wait_s` is part of `busy_s`; None: not known."""

    name: str
    actors: int
    busy_s: float
    cpu_s: float
    core_wait_s: float | None = None


def bound(stages: Sequence[StageCost], cores: float) -> tuple[float, str]:
    """The model's throughput in images/s, and what limits it: a stage's name, or CORES."""
    bounds = [(stage.actors / stage.busy_s, stage.name) for stage in stages if stage.busy_s > 0]
    cpu_s = sum(stage.cpu_s for stage in stages)
    if cpu_s > 0:
        # First in the list wins a tie: with as many actors as cores both are true, and "more actors" would be bad advice.
        bounds.insert(0, (cores / cpu_s, CORES))
    return min(bounds, key=lambda pair: pair[0], default=(0.0, CORES))


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

    return [replace(stage, busy_s=max(free(stage), 1e-9) if stage.busy_s > 0 else 0.0, core_wait_s=None) for stage in stages]


def best(
    stages: Sequence[StageCost],
    cores: float,
    actors: int,
    *,
    fixed: Collection[str] = (),
    images: float = math.inf,
    start_s: float = 0.0,
) -> dict[str, int]:
    """The fewest actors of each stage that reach the model's highest throughput, or finish `images` soonest.

    Args:
        stages: their costs (`uncontended`); the counts they have matter for `fixed` ones only.
        cores: that they share.
        actors: of all stages together, at most.
        fixed: stages whose count stays as it is.
        images: how many there are to do.
        start_s: CPU seconds that starting an actor costs.
    """
    counts = {stage.name: stage.actors if stage.name in fixed else 1 for stage in stages}
    cpu_s = sum(stage.cpu_s for stage in stages)
    at_most = cores / cpu_s if cpu_s > 0 else math.inf
    found: list[tuple[float, dict[str, int]]] = []
    while True:
        rates = [(counts[stage.name] / stage.busy_s, stage.name) for stage in stages if stage.busy_s > 0]
        rate, slowest = min(rates, default=(math.inf, ""))
        took_s = images / min(rate, at_most) + sum(counts.values()) * start_s / cores if images < math.inf else -rate
        found.append((took_s, dict(counts)))
        if slowest in fixed or rate >= ENOUGH * at_most or math.isinf(rate) or sum(counts.values()) >= actors:
            return min(found, key=lambda pair: pair[0])[1]
        counts[slowest] += 1


def better(stages: Sequence[StageCost], cores: float, actors: int, *, fixed: Collection[str] = ()) -> dict[str, int] | None:
    """Counts that are worth changing to, by the costs as measured with those there are; None: what there is will do.

    Stages that must give some up for others do; actors that only wait are left alone, as they cost memory and no time.
    """
    free = uncontended(stages, cores)
    now, _ = bound(free, cores)
    counts = best(free, cores, actors, fixed=fixed)
    then, _ = bound([replace(stage, actors=counts[stage.name]) for stage in free], cores)
    if not now or then < WORTH * now:
        return None
    spare = actors - sum(max(counts[stage.name], stage.actors) for stage in free)
    if spare >= 0:
        return {stage.name: max(counts[stage.name], stage.actors) for stage in free}
    return counts


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something a user can do, and the throughput the model expects of it."""

    change: str
    predicted_images_per_s: float


def changes(stages: Sequence[StageCost], cores: float, measured: float) -> list[Change]:
    """What one more actor of each stage, and one more core, would bring; best first.

    The model gives the ratio; `measured` images/s anchors it, so what the model leaves out does not show as gain.
    """
    base = uncontended(stages, cores)
    now, _ = bound(base, cores)
    if not now or not measured:
        return []
    options = [
        (
            f"{stage.name} actors {stage.actors} -> {stage.actors + 1}",
            [replace(s, actors=s.actors + (s is stage)) for s in base],
            cores,
        )
        for stage in base
    ]
    options.append((f"cores {cores:g} -> {cores + 1:g}", base, cores + 1))
    most = [replace(s, actors=s.actors + 1) for s in base]
    options.append((f"cores {cores:g} -> {cores + 1:g} and an actor more of each stage", most, cores + 1))
    found = [Change(change=text, predicted_images_per_s=measured * bound(then, c)[0] / now) for text, then, c in options]
    distinct: list[Change] = []
    for change in found:  # what costs more and brings no more is no advice
        if all(abs(change.predicted_images_per_s / other.predicted_images_per_s - 1) > 0.02 for other in distinct):
            distinct.append(change)
    return sorted(distinct, key=lambda change: -change.predicted_images_per_s)
