"""What a sweep measured, as curves over counts. Pure functions over plain records.

A record is one measurement, a row of raypipe.sweep.measure.RESULTS. Time and CPU are medians of the
repeats. Whether time falls or is flat is the slope of log time over log count: -1 where twice the
actors take half the time, 0 where they change nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import Any, Literal

from raypipe.insight import planner
from raypipe.insight.markup import known

Record = Mapping[str, Any]
Writing = Literal["none", "one", "same", "fused"]

BACKENDS = ("opencv", "torchvision")
WRITING: tuple[Writing, ...] = ("none", "one", "same")
"""Writers of a point of the talk's: none, one whatever the actors, or as many as actors."""

STAGES = ("preprocess", "write", "train")

MANY = 10
"""Actors at which the talk compares one writer, as many writers, and none (14:34)."""

FIXED_TIMES = 10.0
"""A cell decides claims only where it takes at least so many times its fixed cost."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """What the records were measured on, and with which delays of an image (milliseconds)."""

    cores: float
    gpus: int = 0
    read_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One point of a curve: its repeats. `count`: of actors, or of training workers."""

    count: int
    records: Sequence[Record]

    def values(self, key: str) -> list[float]:
        """What the repeats measured of `key`, without what is not known."""
        return [value for record in self.records if (value := known(record.get(key))) is not None]

    def median(self, key: str) -> float | None:
        values = self.values(key)
        return median(values) if values else None

    def limit(self) -> str:
        """What limited most repeats: a stage or planner.CORES."""
        return Counter(str(record.get("limit")) for record in self.records).most_common(1)[0][0]


def curve(
    records: Iterable[Record],
    *,
    backend: str,
    writing: str = "none",
    kind: str = "preprocess",
    threads: int | None = None,
    over: str = "actors",
    where: Callable[[Record], bool] = lambda record: True,
) -> list[Spot]:
    """The points of one line, by count.

    Args:
        writing: none, one or same, of kind "preprocess". One actor with one writer is on both
        lines. Or fused, a kind of its own, which is in no claim of the talk.
        threads: of the backend within an actor; None: the fewest that were measured.
        over: actors or workers.
        where: which of these records.
    """
    wanted: dict[str, Callable[[Record], bool]] = {
        "none": lambda r: r["writers"] == 0,
        "one": lambda r: r["writers"] == 1,
        "same": lambda r: r["writers"] == r["actors"],
    }
    if writing == "fused":
        kind = writing
    found = [r for r in records if r["kind"] == kind and r["backend"] == backend and where(r)]
    if kind == "preprocess":
        found = [r for r in found if wanted[writing](r)]
    few = min((r["threads"] for r in found), default=1) if threads is None else threads
    found = [r for r in found if r["threads"] == few]
    counts = sorted({int(r[over]) for r in found})
    return [Spot(count=count, records=[r for r in found if r[over] == count]) for count in counts]


def timed(spots: Sequence[Spot]) -> list[Spot]:
    """Those whose time is known."""
    return [spot for spot in spots if spot.median("time_s")]


def levels(spots: Sequence[Spot]) -> list[float]:
    """The CPU use of each, in percent of all cores."""
    return [level for spot in spots if (level := spot.median("cpu_percent")) is not None]


def wide(spots: Sequence[Spot]) -> bool:
    """Whether the largest count is at least twice the smallest."""
    return len(spots) >= 2 and spots[-1].count >= 2 * spots[0].count


def limited(spots: Sequence[Spot], by: str) -> list[Spot]:
    return [spot for spot in spots if spot.limit() == by]


def slope(spots: Sequence[Spot], key: str = "time_s") -> float:
    """Of log `key` over log count, by least squares; two counts at least."""
    pairs = [
        (math.log(spot.count), math.log(value)) for spot in spots if (value := spot.median(key))
    ]
    return linear_regression(*zip(*pairs, strict=True)).slope


def cpu_s(spot: Spot) -> float:
    """CPU seconds that an image takes: all stages together, and Ray beside them."""
    keys = (*(f"{stage}_cpu_s" for stage in STAGES), "overhead_cpu_s")
    return sum(spot.median(key) or 0.0 for key in keys)


def held_up(record: Record) -> float | None:
    """Share of the time in which a preprocess actor waits for the writers.

    It is blocked, or it was done long before them where the queue takes in all.
    """
    busy_s, images, time_s = (
        known(record.get(key)) for key in ("preprocess_busy_s", "images", "time_s")
    )
    if busy_s is None or not images or not time_s:
        return None
    starved = known(record.get("preprocess_starved")) or 0.0
    return max(1 - busy_s * images / (record["actors"] * time_s) - starved, 0.0)


def full_at(spots: Sequence[Spot], cores: float) -> float:
    """The count from which on the cores are full, by the CPU that an image takes at the first."""
    first = spots[0]
    used = cpu_s(first) * (first.median("images_per_s") or 0.0)
    return first.count * cores / used if used else math.inf


def ideal(spots: Sequence[Spot], cores: float) -> list[tuple[int, float]]:
    """(count, seconds): the time of the fewest actors, divided until the cores are full."""
    spots = timed(spots)
    if not spots:
        return []
    first, most = spots[0], full_at(spots, cores)
    time_s = first.median("time_s") or 0.0
    return [
        (spot.count, time_s * first.count / max(min(spot.count, most), first.count))
        for spot in spots
    ]


def three(records: Sequence[Record], backend: str) -> dict[str, Spot]:
    """The points of claim 11: one writer, as many, and none, all with the same number of actors.

    That is 10, or the nearest above 1 that was measured in all three ways; empty without one.
    """
    lines = {
        writing: {spot.count: spot for spot in curve(records, backend=backend, writing=writing)}
        for writing in WRITING
    }
    common = [
        count for count in set.intersection(*(set(line) for line in lines.values())) if count > 1
    ]
    if not common:
        return {}
    count = min(common, key=lambda count: (abs(count - MANY), count))
    return {writing: lines[writing][count] for writing in ("one", "same", "none")}


def others(records: Iterable[Record], cores: float) -> float:
    """Percent of all cores that other programs held meanwhile, at least: the median.

    What may be Ray's is not in it.
    """
    held = []
    for record in records:
        percent, rate = known(record.get("cpu_percent")), known(record.get("images_per_s"))
        if percent is None or rate is None:
            continue
        own = sum(known(record.get(f"{stage}_cpu_s")) or 0.0 for stage in STAGES)
        counts = (known(record.get(count)) or 0 for count in ("actors", "writers", "workers"))
        ended, time_s = sum(counts) * planner.END_S, known(record.get("time_s"))
        own_cores = rate * own + (ended / time_s if time_s else 0.0)
        held.append(planner.held_by_others(percent, own_cores, cores))
    return median(held) if held else 0.0


# --- cells that are too short -------------------------------------------------------------------


def decides(record: Record) -> bool:
    """Whether a cell took long enough: FIXED_TIMES its fixed cost, where that was measured."""
    fixed_s, time_s = known(record.get("fixed_s")), known(record.get("time_s"))
    return fixed_s is None or time_s is None or time_s >= FIXED_TIMES * fixed_s


def enough_images(records: Iterable[Record]) -> int:
    """How many images would make all of these cells long enough, rounded up to two digits."""
    most = 0.0
    for record in records:
        fixed_s, rate = known(record.get("fixed_s")), known(record.get("images_per_s"))
        if fixed_s is not None and rate is not None:
            most = max(most, FIXED_TIMES * fixed_s * rate)
    if most < 1:
        return 0
    digit = 10 ** max(math.floor(math.log10(most)) - 1, 0)
    return math.ceil(most / digit) * digit
