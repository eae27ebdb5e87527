"""The rules by which the talk's claims are judged: small pure functions over curves.

A claim that this machine cannot decide is said to be that: its cores are full before the effect
could show, it has no GPU, or it was not measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from raypipe.insight.markup import ARROW, number
from raypipe.insight.planner import CORES
from raypipe.sweep.curves import (
    BACKENDS,
    WRITING,
    Record,
    Spot,
    Where,
    cpu_s,
    curve,
    full_at,
    held_up,
    levels,
    limited,
    slope,
    three,
    timed,
    wide,
)

Holds = Literal["yes", "no", "cannot"]

FALLS = -0.5
"""Time falls where its slope is at most this: twice the actors take at most 0.71 of the time."""

FLAT = 0.15
"""Time is flat where its slope is within this of 0: twice the actors change it by at most 10%."""

NEAR = 1.25
"""Times are apart where their ratio is more than this."""

CLOSED = 0.8
"""More writers come close to preprocessing only where they close this share of one writer's gap."""

POINTS = 10.0
"""Percentages of CPU or GPU are close within this many points; "far above" is beyond it."""

FULL = 90.0
"""Percent of all cores that count as about 100."""

HELD_UP = 0.25
"""Share of the time that actors must be held up for the queue behind them to be the cause."""

SLACK = 1.1
"""Speed-up is judged up to this factor beyond where the CPU that an image takes fills the cores.
CPU an image differs a little between points."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A claim for one backend."""

    holds: Holds
    measured: str
    why: str = ""


Parts = dict[str, Part]
"""A claim by backend, or by threads; "": it is about all of them."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What rules judge by."""

    records: Sequence[Record]
    where: Where

    def curve(self, backend: str, writing: str) -> list[Spot]:
        return curve(self.records, backend=backend, writing=writing)


def cannot(why: str, measured: str = "") -> Part:
    return Part(holds="cannot", measured=measured, why=why)


def holds_if(condition: bool) -> Holds:
    return "yes" if condition else "no"


def times(spots: Sequence[Spot]) -> str:
    first, last = spots[0], spots[-1]
    times = f"{number(first.median('time_s'))}{ARROW}{number(last.median('time_s'))} s"
    return f"{times} from {first.count} to {last.count}"


def several(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def each(
    sweep: Sweep,
    writing: str,
    judge: Callable[[str, list[Spot]], Part],
    backends: Sequence[str] = BACKENDS,
) -> Parts:
    """`judge` of each backend's curve, where there is one."""
    found = {}
    for backend in backends:
        if spots := sweep.curve(backend, writing):
            found[backend] = judge(backend, spots)
        elif any(record["backend"] == backend for record in sweep.records):
            found[backend] = cannot(f"not measured: --writers {writing}")
        else:
            found[backend] = cannot(f"{backend} was not measured: --backends")
    return found


# --- falls and flat -----------------------------------------------------------------------------


def falls(spots: Sequence[Spot], cores: float, what: str = "actors") -> Part:
    """Time falls as there are more, as far as the cores allow."""
    spots = timed(spots)
    if not wide(spots):
        return cannot(f"needs at least two numbers of {what}, one twice the other")
    most = full_at(spots, cores)
    within = [spot for spot in spots if spot.count <= SLACK * most]
    if not wide(within):
        spent = cpu_s(spots[0]) * (spots[0].median("images_per_s") or 0.0)
        return cannot(
            f"with {spots[0].count} of them {number(spent)} of the {cores:g} cores are in use "
            "already, so twice as many cannot take half the time",
            f"{times(spots)} {what}",
        )
    found = slope(within)
    beyond = f"; the cores are full at {number(most)}" if within[-1] is not spots[-1] else ""
    return Part(
        holds=holds_if(found <= FALLS),
        measured=f"slope {found:+.2f} ({times(within)} {what}{beyond})",
    )


def flat(spots: Sequence[Spot], what: str = "actors") -> Part:
    """Time stays as there are more."""
    spots = timed(spots)
    if not wide(spots):
        return cannot(f"needs at least two numbers of {what}, one twice the other")
    found = slope(spots)
    return Part(
        holds=holds_if(abs(found) <= FLAT), measured=f"slope {found:+.2f} ({times(spots)} {what})"
    )


def falls_alone(sweep: Sweep) -> Parts:
    return each(sweep, "none", lambda _, spots: falls(spots, sweep.where.cores))


def falls_with_writers(sweep: Sweep) -> Parts:
    return each(
        sweep, "same", lambda _, spots: falls(spots, sweep.where.cores, "actors and writers")
    )


# --- CPU use ------------------------------------------------------------------------------------


def far_above(sweep: Sweep) -> Parts:
    """Claim 6: OpenCV's CPU use against torchvision's, by threads an actor."""
    alone = [r for r in sweep.records if r["kind"] == "preprocess" and r["writers"] == 0]
    counts = sorted({r["threads"] for r in alone})
    if not counts:
        return {"": cannot("not measured: --writers none")}
    parts = {f"{several(n, 'thread')} an actor": _apart(sweep, n) for n in counts}
    if "no" not in {part.holds for part in parts.values()}:
        return parts
    held = [name for name, part in parts.items() if part.holds == "yes" and name[:2] != "1 "]
    if held:  # the claim is about OpenCV as it comes, which is with a pool of threads
        why = (
            f"With {held[-1]}, which is OpenCV's thread pool, and not with one: "
            "the pool makes the difference"
        )
        return {name: replace(part, holds="yes", why=why) for name, part in parts.items()}
    if len(counts) == 1:
        hint = (
            f"An actor has {several(counts[0], 'thread')} of either library; "
            f"--threads 1 {sweep.where.cores:g} gives OpenCV its pool too"
        )
        return {name: replace(part, why=hint) for name, part in parts.items()}
    return parts


def _apart(sweep: Sweep, threads: int) -> Part:
    opencv, torchvision = (
        {s.count: s for s in curve(sweep.records, backend=backend, threads=threads)}
        for backend in BACKENDS
    )
    both = sorted(opencv.keys() & torchvision.keys())
    pairs = [
        (a, b)
        for count in both
        if (a := opencv[count].median("cpu_percent")) is not None
        and (b := torchvision[count].median("cpu_percent")) is not None
        and count <= max(sweep.where.cores, both[0])
    ]
    if not pairs:
        return cannot("needs both backends: --backends opencv torchvision")
    apart = sum(a - b for a, b in pairs) / len(pairs)
    most = max(spot.median("cpu_percent") or 0.0 for spot in opencv.values())
    return Part(
        holds=holds_if(apart > POINTS and most >= FULL),
        measured=f"OpenCV {round(apart):+d} points from torchvision, and reaches {most:.0f}%",
    )


def rises_or_full(sweep: Sweep) -> Parts:
    """Claim 12: CPU use with as many writers as actors."""

    def judge(backend: str, spots: list[Spot]) -> Part:
        found = levels(spots)
        if not found or not wide(spots):
            return cannot("needs at least two numbers of writers, one twice the other")
        measured = (
            f"{found[0]:.0f}{ARROW}{found[-1]:.0f}% from {spots[0].count} to {spots[-1].count}"
        )
        if backend != "opencv":
            return Part(holds=holds_if(found[-1] - found[0] > POINTS), measured=measured)
        able = levels([spot for spot in spots if 2 * spot.count >= sweep.where.cores])
        if not able:
            return cannot(
                "actors and writers together were never as many as the "
                f"{sweep.where.cores:g} cores",
                measured,
            )
        return Part(holds=holds_if(min(able) >= FULL), measured=measured)

    return each(sweep, "same", judge)


def close_to_alone(sweep: Sweep) -> Parts:
    """Claim 13: CPU use with as many writers as actors, against none."""

    def judge(backend: str, spots: list[Spot]) -> Part:
        alone = {
            spot.count: level
            for spot in sweep.curve(backend, "none")
            if (level := spot.median("cpu_percent")) is not None
        }
        apart = [
            (spot.count, level - alone[spot.count])
            for spot in spots
            if spot.count in alone and (level := spot.median("cpu_percent")) is not None
        ]
        if not apart:
            return cannot("not measured: --writers none same, with the same actors")
        count, points = apart[-1]
        return Part(
            holds=holds_if(abs(points) <= POINTS),
            measured=f"{round(points):+d} points from it with {count} of each",
        )

    return each(sweep, "same", judge)


# --- one writer ---------------------------------------------------------------------------------


def _no_limit(spots: Sequence[Spot], cores: float) -> Part | None:
    """Why nothing can be said of the one writer as a bottleneck; None: it is one."""
    if not spots:
        return cannot("not measured: --writers one")
    if wide(limited(spots, "write")):
        return None
    last = spots[-1]
    cpu = number(last.median("cpu_percent"))
    at = f"with {last.count} actors and 1 writer the machine is {cpu}% busy"
    if last.limit() == CORES:
        return cannot(
            f"the {cores:g} cores are full before the one writer is; "
            "--store-ms has it wait for a slow store instead",
            at,
        )
    if last.limit() == "write":
        return cannot(
            f"the one writer limits with {last.count} actors, but not with fewer: "
            "more counts would show it",
            at,
        )
    if last.limit() != "preprocess":
        return cannot("what limits was not measured", at)
    return Part(
        holds="no",
        measured=f"up to {last.count} actors one writer keeps up",
        why="storing takes less time here than preprocessing",
    )


def flat_with_one(sweep: Sweep) -> Parts:
    """Claim 7."""

    def judge(_: str, spots: list[Spot]) -> Part:
        return _no_limit(spots, sweep.where.cores) or flat(limited(spots, "write"))

    return each(sweep, "one", judge)


def cpu_stays_with_one(sweep: Sweep) -> Parts:
    """Claim 8: OpenCV's CPU use with one writer."""

    def judge(backend: str, spots: list[Spot]) -> Part:
        if (nothing := _no_limit(spots, sweep.where.cores)) is not None:
            return nothing
        found = levels(limited(spots, "write"))
        if not found:
            return cannot("the use of the CPU was not measured")
        without = levels(sweep.curve(backend, "none"))
        if not without:
            return cannot("nothing to compare with: --writers none one")
        alone, least, most = max(without), min(found), max(found)
        return Part(
            holds=holds_if(most - least <= POINTS and most < alone - POINTS),
            measured=f"{least:.0f} to {most:.0f}%; preprocessing only reaches {alone:.0f}%",
        )

    return each(sweep, "one", judge, ("opencv",))


def held_up_by_one(sweep: Sweep) -> Parts:
    """Claim 9: actors wait for the one writer."""

    def judge(_: str, spots: list[Spot]) -> Part:
        if (nothing := _no_limit(spots, sweep.where.cores)) is not None:
            return nothing
        last = limited(spots, "write")[-1]
        shares = [share for record in last.records if (share := held_up(record)) is not None]
        if not shares:
            return cannot("what actors did with their time was not measured")
        held, busy = median(shares), number(last.median("write_busy"), "%", 100)
        return Part(
            holds=holds_if(held >= HELD_UP),
            measured=f"{last.count} actors are held up {held:.0%} of the time, "
            f"the writer is busy {busy}",
        )

    return each(sweep, "one", judge)


def gap_closed(sweep: Sweep) -> Parts:
    """Claim 11: how much of the time that one writer adds more writers take away."""

    def judge(backend: str, _: list[Spot]) -> Part:
        spots = three(sweep.records, backend)
        if len(timed(list(spots.values()))) < len(WRITING):
            return cannot("not measured: --writers none one same, with 2 actors or more")
        one, same, none = (
            spots[writing].median("time_s") or math.nan for writing in ("one", "same", "none")
        )
        count = spots["same"].count
        said = (
            f"{count} actors: {number(one)} s with 1 writer, {number(same)} s with {count}, "
            f"{number(none)} s without"
        )
        if one <= NEAR * none:
            return cannot(
                f"one writer takes {one / none:.2f} times as long as none: "
                "there is no gap for more to close",
                said,
            )
        closed = (one - same) / (one - none)
        said += f": {closed:.0%} of the gap is closed"
        if closed < CLOSED and spots["same"].limit() == CORES:
            cores = f"{sweep.where.cores:g}"
            return cannot(f"storing takes CPU too, and the {cores} cores are full", said)
        return Part(holds=holds_if(closed >= CLOSED), measured=said)

    return each(sweep, "same", judge)


# --- the libraries ------------------------------------------------------------------------------


def few_or_many(sweep: Sweep) -> Parts:
    """Claim 14: which library is ahead with few actors, and which with many."""
    opencv, torchvision = (
        {s.count: s.median("time_s") or math.nan for s in timed(sweep.curve(backend, "none"))}
        for backend in BACKENDS
    )
    counts = sorted(opencv.keys() & torchvision.keys())
    if not counts or counts[-1] < 2 * counts[0]:
        why = "needs both backends with two numbers of actors, one twice the other, and no writers"
        return {"": cannot(why)}
    few, many = (torchvision[count] / opencv[count] for count in (counts[0], counts[-1]))
    holds = holds_if(few > 1.1 and many < 1 / 1.1)
    measured = (
        f"preprocessing only, torchvision takes {few:.2f} times OpenCV's time with {counts[0]}, "
        f"{many:.2f} times with {counts[-1]}"
    )
    why = "" if holds == "yes" else _ahead(few, many)
    return {"": Part(holds=holds, measured=measured, why=why)}


def _ahead(few: float, many: float) -> str:
    if few > 1.1 and many > 1.1:
        return "OpenCV is ahead with few and with many"
    if few < 1 / 1.1 and many < 1 / 1.1:
        return "torchvision is ahead with few and with many"
    return "The backends are no more than a tenth apart, or change places the other way round"
