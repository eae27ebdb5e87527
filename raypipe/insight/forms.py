"""The forms of a pipeline: who does a step, actors of its own or those of the step before.

Fused, a stage of several steps, `preprocess+write`: an image stays in its actor. Separate: between
two stages the first copies it into Ray's object store, and the second maps it. Each form has its
costs of stages, and the planner says what each gives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raypipe.insight import planner
from raypipe.insight.markup import known
from raypipe.insight.planner import Machine, StageCost

FORMS = {"preprocess+write": "fused", "write": "separate"}
"""The forms by the name of the stage that writes. Of other pipelines there is one form only."""

PUT_S = 0.8e-9
"""CPU seconds a byte that an actor takes to put a block into the object store."""

SLOWED_S = 0.4e-9
"""CPU seconds a byte by which a put slows the step that made the block: it fills the caches."""

GET_S = 0.2e-9
"""CPU seconds a byte that the next stage's step takes to map a block: page faults."""


def staged(steps: Sequence[StageCost], names: Sequence[str]) -> list[StageCost]:
    """What stages cost an image that do `steps`.

    Args:
        steps: in the order of the pipeline, without what lies between them.
        names: of the stages: of each the names of its steps, joined by "+".

    Returns:
        The costs of those stages all of whose steps are known, with the actors of the first step.
    """
    by_name = {step.name: step for step in steps}
    found: list[StageCost] = []
    taken = 0.0  # bytes that the stage before hands on
    for place, name in enumerate(names):
        parts = [by_name[part] for part in name.split("+") if part in by_name]
        if len(parts) < len(name.split("+")):
            continue
        given = parts[-1].out_bytes if place < len(names) - 1 else 0.0
        store_s = (PUT_S + SLOWED_S) * given + GET_S * taken
        waits = [part.core_wait_s for part in parts]
        told_waits = [wait for wait in waits if wait is not None]
        found.append(
            replace(
                parts[0],
                name=name,
                busy_s=sum(part.busy_s for part in parts) + store_s,
                cpu_s=sum(part.cpu_s for part in parts) + store_s,
                core_wait_s=sum(told_waits) if len(told_waits) == len(waits) else None,
                holds=sum(part.holds for part in parts),
                out_bytes=given,
            )
        )
        taken = given
    return found


def other(report: Mapping[str, Any]) -> tuple[str, list[StageCost]] | None:
    """The form of writing that did not run, and what its stages cost by what the other measured.

    A stage costs what its steps cost, what the object store takes, and what Ray does in an actor
    for any block: the least that was measured of it.

    Returns:
        "fused" or "separate", and costs without waiting for cores (`planner.uncontended`), with as
        many actors as those that ran had. None: nothing was written, or a step was not measured.
    """
    ran = {stage["name"]: stage for stage in report["stages"] if stage["name"] in _PARTS}
    if not ran.keys() & FORMS.keys():
        return None
    steps, rays_s = [], math.inf
    for stage in ran.values():
        costs = _steps(stage)
        if costs is None:
            return None
        steps += costs
        rays_s = min(rays_s, stage["cpu_s_per_image"] - sum(step.cpu_s for step in costs))
    if [step.name for step in steps] != ["preprocess", "write"]:
        return None
    form = "separate" if "preprocess+write" in ran else "fused"
    names = ["preprocess", "write"] if form == "separate" else ["preprocess+write"]
    free = planner.uncontended(steps, report["hardware"]["cores"])
    if form == "fused":
        free = _without_store(*free)
    rays_s = max(rays_s, 0.0)
    return form, [
        replace(stage, busy_s=stage.busy_s + rays_s, cpu_s=stage.cpu_s + rays_s)
        for stage in staged(free, names)
    ]


def _without_store(first: StageCost, last: StageCost) -> list[StageCost]:
    """What the steps of two stages would cost without the object store between them."""
    return [
        replace(step, busy_s=max(step.busy_s - store_s, 0.0), cpu_s=max(step.cpu_s - store_s, 0.0))
        for step, store_s in (
            (first, SLOWED_S * first.out_bytes),
            (last, GET_S * first.out_bytes),
        )
    ]


_PARTS = ("preprocess", "preprocess+write", "write")


def _steps(stage: Mapping[str, Any]) -> list[StageCost] | None:
    """The costs of the steps of a report's stage; None: one was not measured."""
    steps, images = stage.get("steps") or [], stage.get("images")
    if not steps or not images or any(not step["busy_s_per_image"] for step in steps):
        return None
    return [
        StageCost(
            name=step["name"],
            actors=stage["actors"]["end"] or stage["actors"]["max"],
            busy_s=step["busy_s_per_image"],
            cpu_s=step["cpu_s_per_image"],
            core_wait_s=step["core_wait_s_per_image"],
            out_bytes=step["bytes_out"] / images,
        )
        for step in steps
    ]


def told(report: Mapping[str, Any], measured: float) -> dict[str, Any] | None:
    """What the report says of the two forms of writing (its `writing`), as JSON types.

    None: nothing was written, or how many actors did it is not known, as on a Ray whose pools
    raypipe cannot see. The other form gets as many actors as ran, or one more than there are cores
    if that is more.

    Args:
        measured: images/s of the run. The model gives the ratio, as for any change.
    """
    found = other(report)
    if found is None or not measured or not planner.costs_of(report["stages"]):
        return None
    form, stages = found
    costs, machine = planner.of_report(report)
    now, _ = planner.bound(costs, machine)
    room = max(machine.actors, math.ceil(machine.cores) + 1)
    there = replace(machine, actors=room)
    counts = planner.best(stages, there)
    then, _ = planner.bound(planner.with_actors(stages, counts), there)
    return {
        "form": next(name for name in FORMS.values() if name != form),
        "other": {
            "form": form,
            "actors": counts,
            "predicted_images_per_s": measured * then / now,
            "ratio": then / now,
        },
    }


def said(writing: Mapping[str, Any] | None) -> str:
    """Which form of writing ran, and what the other would have given; empty: not known."""
    then = (writing or {}).get("other") or {}
    rate, ratio = (known(then.get(key)) for key in ("predicted_images_per_s", "ratio"))
    if rate is None or ratio is None:
        return ""
    ran, instead = (
        ("Fused writing ran", "separate writers")
        if then.get("form") == "separate"
        else ("Separate writers ran", "fused writing")
    )
    actors = " + ".join(f"{n} {stage}" for stage, n in (then.get("actors") or {}).items())
    return (
        f"{ran}; {instead} would give about {rate:.0f} images/s by the model "
        f"({ratio:.2f} of this), with {actors}"
    )


def best_instead(report: Mapping[str, Any], machine: Machine) -> str:
    """What the form of writing that did not run would give on `machine`; empty: not known."""
    found = other(report)
    if found is None:
        return ""
    form, stages = found
    there = planner.outlook(stages, machine)
    limit = "cores" if there.limit == planner.CORES else there.limit
    actors = " + ".join(f"{count} {stage}" for stage, count in there.counts.items())
    return (
        f"{'separate writers' if form == 'separate' else 'fused writing'} instead: about "
        f"{there.images_per_s:.0f} images/s with {actors}, limited by {limit}"
    )
