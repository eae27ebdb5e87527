"""From what the stages cost to which one limits, and what a change would bring.

Stage i needs b_i busy seconds and u_i CPU seconds an image. With c_i actors on C cores:

    throughput = min( min_i c_i / b_i , C / sum_i u_i )     images/s

Busy seconds contain waiting: for a disk, for a network, and for a core when there are more actors than cores.
"""

from dataclasses import dataclass, replace

CORES = "cores"
"""What `bound` calls the machine's cores when no single stage's actors limit, but all of them together."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one image costs a stage, and how many actors it has."""

    name: str
    actors: int
    busy_s: float
    cpu_s: float


def bound(stages: list[StageCost], cores: float) -> tuple[float, str]:
    """The model's throughput in images/s, and what limits it: a stage's name, or CORES."""
    bounds = [(stage.actors / stage.busy_s, stage.name) for stage in stages if stage.busy_s > 0]
    cpu_s = sum(stage.cpu_s for stage in stages)
    if cpu_s > 0:
        # First in the list wins a tie: with as many actors as cores both are true, and "more actors" would be bad advice.
        bounds.insert(0, (cores / cpu_s, CORES))
    return min(bounds, key=lambda pair: pair[0], default=(0.0, CORES))


def uncontended(stages: list[StageCost], cores: float) -> list[StageCost]:
    """`stages` with busy seconds less what is spent waiting for a core.

    When the actors' CPU seconds fill the cores, busy time grows with every further actor without any work being done in it. What a
    shard would take on a free core is its CPU time, plus waiting that is not for a core; of that the measurement only says how much
    it is at most, so the share that contention explains is taken off.
    """
    rate = min((stage.actors / stage.busy_s for stage in stages if stage.busy_s > 0), default=0.0)
    used = rate * sum(stage.cpu_s for stage in stages) / cores if cores else 0.0
    if used < 0.9:
        return stages
    return [replace(stage, busy_s=max(min(stage.cpu_s, stage.busy_s), 1e-9)) for stage in stages]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something a user can do, and the throughput the model expects of it."""

    change: str
    predicted_images_per_s: float


def changes(stages: list[StageCost], cores: float, measured: float) -> list[Change]:
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
