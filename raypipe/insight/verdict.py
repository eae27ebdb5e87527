"""The verdict of a run: which stage limits, why, and what a change would bring. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raypipe.insight import planner
from raypipe.insight.planner import StageCost
from raypipe.insight.states import Shares, Verdict

SHORT_S = 10.0
"""In a run shorter than this, starting and ending outweigh what limits."""

OUTSIDE = 2.0
"""Where the stages could do this many times the measured rate, something outside them limits."""

_WAITS_FOR = {
    "preprocess": "the input",
    "write": "the store",
    "preprocess+write": "the input or the store",
}
"""What a stage waits for where an image occupies it longer than its CPU: a disk or a network."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a verdict is about.

    `cores`: of all nodes. `images_per_s`: what predictions start from, measured over `seconds`.
    `held`: percent of all cores that other programs had (`planner.held_by_others`). `overhead_s`:
    CPU seconds of Ray itself, an image. `resized`: a stage changed its number of actors meanwhile.
    """

    cores: float
    images_per_s: float
    seconds: float
    held: float = 0.0
    overhead_s: float = 0.0
    resized: bool = False


def judge(
    costs: Sequence[StageCost], shares: Mapping[str, Shares | None], measured: Measured
) -> Verdict:
    """Which stage limits, why, and what a change would bring.

    Args:
        costs: of the stages, in the order of the pipeline (`planner.costs_of`).
        shares: of each stage.
    """
    if not costs:
        return Verdict(
            stage=None,
            reason="No stage has finished a shard, so nothing is known of what they cost.",
        )
    idle = max((found.busy for found in shares.values() if found), default=0.0) < 0.5
    if idle and measured.seconds < SHORT_S:
        most = max(costs, key=lambda cost: cost.busy_s / cost.actors)
        return Verdict(
            stage=most.name,
            reason="Too short a run to tell what limits: no stage was busy for even half of the "
            "time that its actors were there.",
        )
    machine = planner.Machine(cores=measured.cores, overhead_s=measured.overhead_s)
    model, limit = planner.bound(planner.uncontended(costs, measured.cores), machine)
    others = ""
    if measured.held > planner.TOLD:
        others = (
            f" Other programs held about {measured.held:.0f}% of the machine's CPU meanwhile: "
            "the figures are of what they left."
        )
    long = measured.seconds >= SHORT_S and measured.images_per_s > 0
    if long and model > OUTSIDE * measured.images_per_s and (idle or not measured.resized):
        return Verdict(stage=None, reason=_outside(costs, shares, measured, model) + others)
    if limit == planner.CORES:
        name, reason = _cores_limit(costs, measured.cores)
    else:
        name, reason = limit, _stage_limits(limit, costs, shares)
    changes = planner.changes(costs, machine, measured.images_per_s)
    return Verdict(stage=name, reason=reason + others, advice=tuple(changes))


def _outside(
    costs: Sequence[StageCost],
    shares: Mapping[str, Shares | None],
    measured: Measured,
    model: float,
) -> str:
    millis = ", ".join(f"{cost.name} {1000 * cost.busy_s:.2f} ms" for cost in costs)
    waits = _waiting(shares, except_for="")
    return (
        f"Something outside the stages limits: they could do about {model:.0f} images/s, and "
        f"{measured.images_per_s:.0f} were measured. An image takes {millis}"
        + "".join(f"; {text}" for text in waits)
        + ". Look at what feeds the run, at what takes its results, and at other programs."
    )


def _cores_limit(costs: Sequence[StageCost], cores: float) -> tuple[str, str]:
    stage = max(costs, key=lambda cost: cost.cpu_s)
    cpu_s = sum(cost.cpu_s for cost in costs)
    return stage.name, (
        f"The {cores:g} cores limit: the stages need {1000 * cpu_s:.2f} ms of CPU an image, "
        f"{100 * stage.cpu_s / cpu_s:.0f}% of it in {stage.name}. "
        "More actors than cores would share the same cores."
    )


def _stage_limits(
    limit: str, costs: Sequence[StageCost], shares: Mapping[str, Shares | None]
) -> str:
    stage = next(cost for cost in costs if cost.name == limit)
    found = shares.get(limit)
    actors = f"{stage.actors} actor" + ("s were" if stage.actors > 1 else " was")
    who = "it was" if stage.fixed else f"its {actors}"
    reason = f"{limit} limits: {who} busy {100 * (found.busy if found else 0.0):.0f}% of the time"
    reason += "".join(f"; {text}" for text in _waiting(shares, except_for=limit)) + "."
    waits = 1 - (stage.cpu_s + (stage.core_wait_s or 0.0)) / stage.busy_s
    if limit in _WAITS_FOR and waits > 0.5:
        reason += f" {100 * waits:.0f}% of that it waited for {_WAITS_FOR[limit]}, not for a core."
    return reason


def _waiting(shares: Mapping[str, Shares | None], *, except_for: str) -> list[str]:
    """What the stages other than one did not do, in words."""
    return [
        f"{name} was {'blocked' if found.blocked > found.starved else 'starved'} "
        f"{100 * max(found.blocked, found.starved):.0f}% of its time"
        for name, found in shares.items()
        if name != except_for and found is not None
    ]
