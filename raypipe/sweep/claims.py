"""What the talk claims, judged by what a sweep measured. Pure functions: plain records in, findings out.

A record is one measurement, as raypipe.sweep.command.RESULTS has it. Time and CPU are taken from medians of the repeats. Whether time falls or is
flat is the slope of log time over log count: -1 where twice the actors take half the time, 0 where they change nothing. A claim that
this machine cannot decide (its cores are full before the effect could show, it has no GPU, it was not measured) is said to be just that.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import linear_regression, median
from typing import Any, Literal

from raypipe.insight import planner
from raypipe.insight.markup import ARROW, known, number
from raypipe.insight.planner import CORES, Machine, StageCost

Record = Mapping[str, Any]
Holds = Literal["yes", "no", "cannot"]

BACKENDS = ("opencv", "torchvision")
WRITING = ("none", "one", "same")
"""Writers of a point: none, one whatever the actors, or as many as actors."""

FALLS = -0.5
"""Time falls where its slope is at most this: twice the actors take at most 0.71 of the time."""

FLAT = 0.15
"""Time is flat where its slope is within this of 0: twice the actors change it by a tenth at most."""

NEAR = 1.25
"""Times are apart where their ratio is more than this."""

CLOSED = 0.8
"""More writers bring the time close to preprocessing only where they close this share of the gap that one writer leaves."""

POINTS = 10.0
"""Percentages of CPU or GPU are close within this many points; "far above" is beyond it."""

FULL = 90.0
"""Percent of all cores that count as about 100."""

HELD_UP = 0.25
"""Share of the time that actors must be held up for the queue behind them to be the cause."""

SLACK = 1.1
"""Speed-up is judged up to where the CPU that an image takes fills the cores, and this factor beyond: CPU an image differs a little between points."""

MANY = 10
"""Actors at which the talk compares one writer, as many writers, and none (14:34)."""

BUDGETS = (1, 2, 4, 8, 16, 32, 64)
"""Cores that advice is given for."""

ACTORS_A_CORE = 16
"""Actors that advice may have for each core: more than one, for those that wait for a store."""

STAGES = ("preprocess", "write", "train")


@dataclass(frozen=True, kw_only=True)
class Where:
    """What the records were measured on, and with which delays of reading and storing (milliseconds an image)."""

    cores: float
    gpus: int = 0
    read_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim of the talk (numbered in its order, and when it is said), and what became of it here."""

    claim: int
    at: str
    statement: str
    holds: Holds
    measured: str
    why: str


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
        """What limited most repeats: a stage or CORES."""
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
        writing: none, one or same, of kind "preprocess". One actor with one writer is on both lines.
        threads: of the backend within an actor; None: the fewest that were measured.
        over: actors or workers.
        where: which records of these.
    """
    wanted = {
        "none": lambda r: r["writers"] == 0,
        "one": lambda r: r["writers"] == 1,
        "same": lambda r: r["writers"] == r["actors"],
    }
    found = [r for r in records if r["kind"] == kind and r["backend"] == backend and where(r)]
    if kind == "preprocess":
        found = [r for r in found if wanted[writing](r)]
    few = min((r["threads"] for r in found), default=1) if threads is None else threads
    found = [r for r in found if r["threads"] == few]
    counts = sorted({int(r[over]) for r in found})
    return [Spot(count=count, records=[r for r in found if r[over] == count]) for count in counts]


def slope(spots: Sequence[Spot], key: str = "time_s") -> float:
    """Of log `key` over log count, by least squares; two counts at least."""
    pairs = [
        (math.log(spot.count), math.log(value)) for spot in spots if (value := spot.median(key))
    ]
    return linear_regression(*zip(*pairs, strict=True)).slope


def cpu_s(spot: Spot) -> float:
    """CPU seconds that an image takes: of all stages together, and of Ray beside them."""
    return sum(
        spot.median(key) or 0.0
        for key in (*(f"{stage}_cpu_s" for stage in STAGES), "overhead_cpu_s")
    )


def held_up(record: Record) -> float | None:
    """Share of the time in which a preprocess actor waits for the writers: blocked, or done long before them, where the queue takes in all."""
    busy_s, images, time_s = (
        known(record.get(key)) for key in ("preprocess_busy_s", "images", "time_s")
    )
    if busy_s is None or not images or not time_s:
        return None
    starved = known(record.get("preprocess_starved")) or 0.0
    return max(1 - busy_s * images / (record["actors"] * time_s) - starved, 0.0)


def full_at(spots: Sequence[Spot], cores: float) -> float:
    """The count at which the CPU that an image takes with the fewest actors, multiplied, fills the cores. Beyond it none is faster."""
    first = spots[0]
    used = cpu_s(first) * (first.median("images_per_s") or 0.0)
    return first.count * cores / used if used else math.inf


def ideal(spots: Sequence[Spot], cores: float) -> list[tuple[int, float]]:
    """(count, seconds): the time of the fewest actors, divided by how many times as many there are until the cores are full."""
    spots = _timed(spots)
    if not spots:
        return []
    first, most = spots[0], full_at(spots, cores)
    time_s = first.median("time_s") or 0.0
    return [
        (spot.count, time_s * first.count / max(min(spot.count, most), first.count))
        for spot in spots
    ]


def others(records: Iterable[Record], cores: float) -> float:
    """Percent of all cores that programs other than the sweep held meanwhile, at least: the median of the measurements. What may be Ray's is not."""
    held = []
    for record in records:
        percent, rate = known(record.get("cpu_percent")), known(record.get("images_per_s"))
        if percent is not None and rate is not None:
            own = sum(known(record.get(f"{stage}_cpu_s")) or 0.0 for stage in STAGES)
            ended = (
                sum(known(record.get(count)) or 0 for count in ("actors", "writers", "workers"))
                * planner.END_S
            )
            time_s = known(record.get("time_s"))
            held.append(
                planner.held_by_others(
                    percent, rate * own + (ended / time_s if time_s else 0.0), cores
                )
            )
    return median(held) if held else 0.0


# --- judging -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A claim for one backend."""

    holds: Holds
    measured: str
    why: str = ""


def _cannot(why: str, measured: str = "") -> _Part:
    return _Part(holds="cannot", measured=measured, why=why)


def _times(spots: Sequence[Spot]) -> str:
    first, last = spots[0], spots[-1]
    return f"{number(first.median('time_s'))}{ARROW}{number(last.median('time_s'))} s from {first.count} to {last.count}"


def _timed(spots: Sequence[Spot]) -> list[Spot]:
    return [spot for spot in spots if spot.median("time_s")]


def _levels(spots: Sequence[Spot]) -> list[float]:
    return [level for spot in spots if (level := spot.median("cpu_percent")) is not None]


def _wide(spots: Sequence[Spot]) -> bool:
    return len(spots) >= 2 and spots[-1].count >= 2 * spots[0].count


def _falls(spots: Sequence[Spot], cores: float, what: str = "actors") -> _Part:
    """Time falls as there are more, as far as the cores let it."""
    spots = _timed(spots)
    if not _wide(spots):
        return _cannot(f"needs at least two numbers of {what}, one twice the other")
    most = full_at(spots, cores)
    within = [spot for spot in spots if spot.count <= SLACK * most]
    if not _wide(within):
        spent = cpu_s(spots[0]) * (spots[0].median("images_per_s") or 0.0)
        return _cannot(
            f"with {spots[0].count} of them {number(spent)} of the {cores:g} cores are in use already, so twice as many cannot take half the time",
            f"{_times(spots)} {what}",
        )
    found = slope(within)
    beyond = f"; the cores are full at {number(most)}" if within[-1] is not spots[-1] else ""
    return _Part(
        holds="yes" if found <= FALLS else "no",
        measured=f"slope {found:+.2f} ({_times(within)} {what}{beyond})",
    )


def _flat(spots: Sequence[Spot], what: str = "actors") -> _Part:
    spots = _timed(spots)
    if not _wide(spots):
        return _cannot(f"needs at least two numbers of {what}, one twice the other")
    found = slope(spots)
    return _Part(
        holds="yes" if abs(found) <= FLAT else "no",
        measured=f"slope {found:+.2f} ({_times(spots)} {what})",
    )


def _limited(spots: Sequence[Spot], by: str) -> list[Spot]:
    return [spot for spot in spots if spot.limit() == by]


def _no_limit(spots: Sequence[Spot], cores: float) -> _Part | None:
    """Why nothing can be said of the one writer as a bottleneck; None: it is one, at several counts."""
    if not spots:
        return _cannot("not measured: --writers one")
    if _wide(_limited(spots, "write")):
        return None
    last = spots[-1]
    at = f"with {last.count} actors and 1 writer the machine is {number(last.median('cpu_percent'))}% busy"
    if last.limit() == CORES:
        return _cannot(
            f"the {cores:g} cores are full before the one writer is; --store-ms has it wait for a slow store instead",
            at,
        )
    if last.limit() == "write":
        return _cannot(
            f"the one writer limits with {last.count} actors, but not with fewer: more counts would show it",
            at,
        )
    if last.limit() != "preprocess":
        return _cannot("what limits was not measured", at)
    return _Part(
        holds="no",
        measured=f"up to {last.count} actors one writer keeps up",
        why="storing takes less time here than preprocessing",
    )


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The curves that claims are about, by backend."""

    records: Sequence[Record]
    where: Where
    curves: dict[tuple[str, str], list[Spot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for backend in BACKENDS:
            for writing in WRITING:
                self.curves[backend, writing] = curve(
                    self.records, backend=backend, writing=writing
                )

    def each(
        self,
        writing: str,
        judge: Callable[[str, list[Spot]], _Part],
        backends: Sequence[str] = BACKENDS,
    ) -> dict[str, _Part]:
        """`judge` of each backend's curve, where there is one."""
        found = {}
        for backend in backends:
            spots = self.curves[backend, writing]
            swept = any(record["backend"] == backend for record in self.records)
            missing = (
                f"not measured: --writers {writing}"
                if swept
                else f"{backend} was not measured: --backends"
            )
            found[backend] = judge(backend, spots) if spots else _cannot(missing)
        return found


def _finding(claim: int, at: str, statement: str, parts: Mapping[str, _Part], rule: str) -> Finding:
    """The parts of a claim as one: it holds if each does, and does not if one does not."""
    verdicts = {part.holds for part in parts.values()}
    holds: Holds = "no" if "no" in verdicts else "cannot" if "cannot" in verdicts else "yes"
    measured = "; ".join(
        f"{name}: {part.measured}" if name else part.measured
        for name, part in parts.items()
        if part.measured
    )
    whys = [
        f"{name}: {part.why}" if len(parts) > 1 else part.why
        for name, part in parts.items()
        if part.why
    ]
    if len({part.why for part in parts.values()}) == 1 and whys:
        whys = [next(iter(parts.values())).why]
    return Finding(
        claim=claim,
        at=at,
        statement=statement,
        holds=holds,
        measured=measured,
        why=". ".join([*whys, rule]),
    )


_FALLS_RULE = f"Falls: slope of log time at most {FALLS:g}, up to where the cores are full"
_FLAT_RULE = f"Flat: slope within {FLAT:g} of 0"


def _claim_5(s: _Sweep) -> Finding:
    parts = s.each("none", lambda _, spots: _falls(spots, s.where.cores))
    return _finding(
        5,
        "11:10",
        "Preprocessing only: time falls as processes rise, with both libraries.",
        parts,
        _FALLS_RULE,
    )


def _claim_6(s: _Sweep) -> Finding:
    statement = (
        "Preprocessing only: OpenCV's CPU use is far above torchvision's, and reaches about 100%."
    )
    rule = f"Far above: by more than {POINTS:g} points of CPU, mean of the counts up to the cores. About 100%: {FULL:g}% or more"
    parts: dict[str, _Part] = {}
    every = sorted(
        {r["threads"] for r in s.records if r["kind"] == "preprocess" and r["writers"] == 0}
    )
    for threads in every:
        lines = [
            {spot.count: spot for spot in curve(s.records, backend=b, threads=threads)}
            for b in BACKENDS
        ]
        both = sorted(lines[0].keys() & lines[1].keys())
        pairs = [
            (a, b)
            for count in both
            if (a := lines[0][count].median("cpu_percent")) is not None
            and (b := lines[1][count].median("cpu_percent")) is not None
            and count <= max(s.where.cores, both[0])
        ]
        name = f"{threads} thread{'s' if threads > 1 else ''} an actor"
        if not pairs:
            parts[name] = _cannot("needs both backends: --backends opencv torchvision")
            continue
        apart = sum(a - b for a, b in pairs) / len(pairs)
        most = max(spot.median("cpu_percent") or 0.0 for spot in lines[0].values())
        parts[name] = _Part(
            holds="yes" if apart > POINTS and most >= FULL else "no",
            measured=f"OpenCV {round(apart):+d} points from torchvision, and reaches {most:.0f}%",
        )
    if not parts:
        parts = {"": _cannot("not measured: --writers none")}
    held = [
        name for name, part in parts.items() if part.holds == "yes" and not name.startswith("1 ")
    ]
    whole = _finding(6, "11:31", statement, parts, rule)
    if (
        held and whole.holds == "no"
    ):  # it is a claim about OpenCV as it comes, which is with a pool of threads
        why = f"With {held[-1]}, which is OpenCV's thread pool, and not with one: the pool makes the difference. {rule}"
        return Finding(
            claim=6, at="11:31", statement=statement, holds="yes", measured=whole.measured, why=why
        )
    if whole.holds == "no" and len(every) == 1:
        hint = f"An actor has {every[0]} thread{'s' if every[0] > 1 else ''} of either library; --threads 1 {s.where.cores:g} gives OpenCV its pool too"
        return Finding(
            claim=6,
            at="11:31",
            statement=statement,
            holds="no",
            measured=whole.measured,
            why=f"{hint}. {rule}",
        )
    return whole


def _claim_7(s: _Sweep) -> Finding:
    def judge(_: str, spots: list[Spot]) -> _Part:
        return _no_limit(spots, s.where.cores) or _flat(_limited(spots, "write"))

    statement = "With one result queue that writes files: time stays flat as processes rise."
    return _finding(
        7,
        "11:57",
        statement,
        s.each("one", judge),
        f"{_FLAT_RULE}, of the counts at which the writer limits",
    )


def _claim_8(s: _Sweep) -> Finding:
    def judge(backend: str, spots: list[Spot]) -> _Part:
        if (nothing := _no_limit(spots, s.where.cores)) is not None:
            return nothing
        levels = _levels(_limited(spots, "write"))
        if not levels:
            return _cannot("the use of the CPU was not measured")
        without = _levels(s.curves[backend, "none"])
        if not without:
            return _cannot("nothing to compare with: --writers none one")
        alone = max(without)
        spread = max(levels) - min(levels)
        measured = (
            f"{min(levels):.0f} to {max(levels):.0f}%; preprocessing only reaches {alone:.0f}%"
        )
        return _Part(
            holds="yes" if spread <= POINTS and max(levels) < alone - POINTS else "no",
            measured=measured,
        )

    statement = "... and CPU use stays at about 80% (OpenCV): the CPU cannot be made the most of."
    rule = f"Stays: within {POINTS:g} points, and more than that below preprocessing only; the level itself is the machine's"
    return _finding(8, "12:21", statement, s.each("one", judge, ("opencv",)), rule)


def _claim_9(s: _Sweep) -> Finding:
    def judge(_: str, spots: list[Spot]) -> _Part:
        if (nothing := _no_limit(spots, s.where.cores)) is not None:
            return nothing
        last = _limited(spots, "write")[-1]
        shares, busy = (
            [share for record in last.records if (share := held_up(record)) is not None],
            last.median("write_busy"),
        )
        if not shares:
            return _cannot("what actors did with their time was not measured")
        held = median(shares)
        measured = f"{last.count} actors are held up {held:.0%} of the time, the writer is busy {number(busy, '%', 100)}"
        return _Part(holds="yes" if held >= HELD_UP else "no", measured=measured)

    statement = "The cause: output is slower than preprocessing, the one result queue fills up."
    rule = f"The verdict names the write stage, and preprocess actors are held up {HELD_UP:.0%} of the time or more: blocked, or done before the writer"
    return _finding(9, "12:55", statement, s.each("one", judge), rule)


def _claim_10(s: _Sweep) -> Finding:
    parts = s.each("same", lambda _, spots: _falls(spots, s.where.cores, "actors and writers"))
    return _finding(
        10,
        "13:36",
        "With as many queues as processes: time falls, with both libraries.",
        parts,
        _FALLS_RULE,
    )


def three(records: Sequence[Record], backend: str) -> dict[str, Spot]:
    """The points of claim 11: one writer, as many writers, and none, all with the same number of actors: 10, or the nearest that was
    measured in all three ways; empty if there is none above 1."""
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


def _claim_11(s: _Sweep) -> Finding:
    def judge(backend: str, _: list[Spot]) -> _Part:
        spots = three(s.records, backend)
        if len(_timed(list(spots.values()))) < len(WRITING):
            return _cannot("not measured: --writers none one same, with 2 actors or more")
        one, same, none = (
            spots[writing].median("time_s") or math.nan for writing in ("one", "same", "none")
        )
        count = spots["same"].count
        said = f"{count} actors: {number(one)} s with 1 writer, {number(same)} s with {count}, {number(none)} s without"
        if one <= NEAR * none:
            return _cannot(
                f"one writer takes {one / none:.2f} times as long as none: there is no gap for more to close",
                said,
            )
        closed = (one - same) / (one - none)
        said += f": {closed:.0%} of the gap is closed"
        if closed < CLOSED and spots["same"].limit() == CORES:
            return _cannot(f"storing takes CPU too, and the {s.where.cores:g} cores are full", said)
        return _Part(holds="yes" if closed >= CLOSED else "no", measured=said)

    statement = (
        "10 processes: with 10 queues time comes close to preprocessing only; with one it does not."
    )
    rule = f"Close: {CLOSED:.0%} of the time that one writer adds is gone with as many writers as actors"
    return _finding(11, "14:20", statement, s.each("same", judge), rule)


def _claim_12(s: _Sweep) -> Finding:
    def judge(backend: str, spots: list[Spot]) -> _Part:
        levels = _levels(spots)
        if not levels or not _wide(spots):
            return _cannot("needs at least two numbers of writers, one twice the other")
        measured = (
            f"{levels[0]:.0f}{ARROW}{levels[-1]:.0f}% from {spots[0].count} to {spots[-1].count}"
        )
        if backend == "opencv":
            able = _levels([spot for spot in spots if 2 * spot.count >= s.where.cores])
            if not able:
                return _cannot(
                    f"actors and writers together were never as many as the {s.where.cores:g} cores",
                    measured,
                )
            return _Part(holds="yes" if min(able) >= FULL else "no", measured=measured)
        return _Part(holds="yes" if levels[-1] - levels[0] > POINTS else "no", measured=measured)

    statement = (
        "CPU use over queues = processes: torchvision's rises, OpenCV's stays at about 100%."
    )
    rule = f"Rises: by more than {POINTS:g} points. About 100%: {FULL:g}% or more wherever actors and writers together are as many as the cores"
    return _finding(12, "14:50", statement, s.each("same", judge), rule)


def _claim_13(s: _Sweep) -> Finding:
    def judge(backend: str, spots: list[Spot]) -> _Part:
        alone = {
            spot.count: level
            for spot in s.curves[backend, "none"]
            if (level := spot.median("cpu_percent")) is not None
        }
        apart = [
            level - alone[spot.count]
            for spot in spots
            if spot.count in alone and (level := spot.median("cpu_percent")) is not None
        ]
        if not apart:
            return _cannot("not measured: --writers none same, with the same actors")
        last = [spot.count for spot in spots if spot.count in alone][-1]
        return _Part(
            holds="yes" if abs(apart[-1]) <= POINTS else "no",
            measured=f"{round(apart[-1]):+d} points from it with {last} of each",
        )

    statement = (
        "With as many queues as processes, CPU use comes close to that of preprocessing only."
    )
    return _finding(
        13,
        "15:33",
        statement,
        s.each("same", judge),
        f"Close: within {POINTS:g} points, with the most actors",
    )


# --- advice --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best actors of a backend for so many cores, and the images/s that the planner expects of them."""

    cores: int
    backend: str
    counts: Mapping[str, int]
    images_per_s: float
    limit: str


def costs(spots: Sequence[Spot], cores: float, stages: Sequence[str]) -> list[StageCost]:
    """What an image costs each of `stages`, by the point with the fewest actors: there the least of it is waiting for one another."""
    if not spots:
        return []
    first = spots[0]
    counts = {"preprocess": "actors", "write": "writers", "train": "workers"}
    found = []
    for stage in stages:
        busy, cpu = first.median(f"{stage}_busy_s"), first.median(f"{stage}_cpu_s")
        if busy and cpu is not None:
            count = int(first.records[0][counts[stage]])
            on_gpu = stage == "train" and first.records[0].get("device") == "gpu"
            wait = first.median(f"{stage}_core_wait_s")
            found.append(
                StageCost(
                    name=stage,
                    actors=count,
                    busy_s=busy,
                    cpu_s=cpu,
                    core_wait_s=wait,
                    on_gpu=on_gpu,
                )
            )
    return planner.uncontended(found, cores) if len(found) == len(stages) else []


def choices(records: Sequence[Record], where: Where, *, writing: bool) -> list[Choice]:
    """For each budget of cores, what the costs measured here say of each backend: writing too, or preprocessing only."""
    found = []
    names = ("preprocess", "write") if writing else ("preprocess",)
    for cores in BUDGETS:
        for backend in BACKENDS:
            stages = costs(
                curve(records, backend=backend, writing="same" if writing else "none"),
                where.cores,
                names,
            )
            if stages:
                best = planner.outlook(stages, Machine(cores=cores, actors=ACTORS_A_CORE * cores))
                found.append(
                    Choice(
                        cores=cores,
                        backend=backend,
                        counts=best.counts,
                        images_per_s=best.images_per_s,
                        limit=best.limit,
                    )
                )
    return found


def _claim_14(s: _Sweep) -> Finding:
    statement = "OpenCV saturates the CPU at 10 processes: use torchvision where many processes are available, OpenCV where few are."
    rule = "By the times measured without writing, with the fewest and with the most actors; more than a tenth counts"
    times = {
        backend: {
            spot.count: spot.median("time_s") or math.nan
            for spot in _timed(s.curves[backend, "none"])
        }
        for backend in BACKENDS
    }
    counts = sorted(times["opencv"].keys() & times["torchvision"].keys())
    if not counts or counts[-1] < 2 * counts[0]:
        why = "needs both backends with two numbers of actors, one twice the other, and no writers"
        return _finding(14, "15:50", statement, {"": _cannot(why)}, rule)
    few, many = (
        times["torchvision"][count] / times["opencv"][count] for count in (counts[0], counts[-1])
    )
    measured = f"preprocessing only, torchvision takes {few:.2f} times OpenCV's time with {counts[0]}, {many:.2f} times with {counts[-1]}"
    holds: Holds = "yes" if few > 1.1 and many < 1 / 1.1 else "no"
    part = _Part(holds=holds, measured=measured, why="" if holds == "yes" else _who(few, many))
    return _finding(14, "15:50", statement, {"": part}, rule)


def _who(few: float, many: float) -> str:
    if few > 1.1 and many > 1.1:
        return "OpenCV is ahead with few and with many"
    if few < 1 / 1.1 and many < 1 / 1.1:
        return "torchvision is ahead with few and with many"
    return "The backends are no more than a tenth apart, or change places the other way round"


@dataclass(frozen=True, kw_only=True)
class Design:
    """Preprocessing in every epoch against doing it once and storing it, of one backend on these cores: `clock` and `cpu` are the seconds
    an image takes by the planner's clock, and of CPU time. `trainer`: images/s of the training alone; None: as fast as data comes."""

    backend: str
    trainer: float | None
    clock: planner.Designs
    cpu: planner.Designs


def designs(records: Sequence[Record], where: Where) -> list[Design]:
    """The two designs of claim 21, for each backend that was measured storing and reading back; with training too, where that was."""
    found = []
    machine = Machine(cores=where.cores, actors=int(ACTORS_A_CORE * where.cores))
    for backend in BACKENDS:
        preprocess = costs(curve(records, backend=backend), where.cores, ("preprocess",))
        write = costs(
            curve(records, backend=backend, kind="store"), where.cores, ("preprocess", "write")
        )[1:]
        stored = costs(curve(records, backend=backend, kind="stored"), where.cores, ("preprocess",))
        if not (preprocess and write and stored):
            continue
        each = replace(preprocess[0], actors=planner.best(preprocess, machine)["preprocess"])
        alone = curve(records, backend=backend, kind="train", where=lambda r: r["workers"] == 1)
        trained = costs(alone, where.cores, ("preprocess", "train"))[1:]
        cpu = planner.Designs(
            once_s=each.cpu_s + write[0].cpu_s, continuous_s=each.cpu_s, stored_s=stored[0].cpu_s
        )
        for train in [None, *trained]:
            clock = planner.designs(
                images=1,
                preprocess=each,
                write=write[0],
                stored=stored[0],
                machine=machine,
                train=train,
            )
            trainer = None if train is None else train.actors / train.busy_s
            found.append(Design(backend=backend, trainer=trainer, clock=clock, cpu=cpu))
    return found


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Where a GPU would go, of one backend, in images/s: as it is, with one more worker that trains, and if a GPU took all of the
    preprocessing at no cost (more than any could do). `ops`: measured with the recipe's ops on the GPU that trains; None: it was not."""

    backend: str
    now: float
    training: float
    preprocessing: float
    ops: float | None


def gpus(records: Sequence[Record], where: Where) -> list[Gpu]:
    """For each backend that was measured training on a GPU."""
    found = []
    for backend in BACKENDS:
        spots = curve(
            records,
            backend=backend,
            kind="train",
            where=lambda r: r["device"] == "gpu" and r["workers"] == 1,
        )
        stages = costs(spots, where.cores, ("preprocess", "train"))
        if not stages:
            continue
        machine = Machine(
            cores=where.cores, actors=int(ACTORS_A_CORE * where.cores), gpus=stages[1].actors
        )
        ops = curve(records, backend=backend, kind="ops")
        found.append(
            Gpu(
                backend=backend,
                now=planner.outlook(stages, machine).images_per_s,
                training=planner.outlook(
                    stages, replace(machine, gpus=stages[1].actors + 1)
                ).images_per_s,
                preprocessing=planner.bound(stages[1:], machine)[0],
                ops=ops[0].median("images_per_s") if ops else None,
            )
        )
    return found


# --- training ------------------------------------------------------------------------------------------------------------


def _training(
    s: _Sweep, judge: Callable[[list[Spot]], _Part], *, over: str, fixed: str
) -> dict[str, _Part]:
    """`judge` of each backend's training on GPUs; on CPUs it is said what was measured, and nothing is judged."""
    parts = {}
    no_gpu = "this machine has no GPU" if not s.where.gpus else "not measured: --train"
    mine = [r for r in s.records if r["kind"] == "train" and r[fixed] == 1]
    for backend in BACKENDS:
        lines = {
            device: curve(
                [r for r in mine if r["device"] == device], backend=backend, kind="train", over=over
            )
            for device in ("gpu", "cpu")
        }
        if lines["gpu"]:
            parts[backend] = judge(lines["gpu"])
        elif lines["cpu"]:
            on_cpu = judge(lines["cpu"])
            parts[backend] = _cannot(
                no_gpu, f"on CPU instead: {on_cpu.measured or _times(lines['cpu'])}"
            )
        else:
            parts[backend] = _cannot(no_gpu)
    return parts


def _claim_17(s: _Sweep) -> Finding:
    parts = _training(s, _flat, over="actors", fixed="workers")
    return _finding(
        17,
        "17:52",
        "Training on 1 GPU: total time stays flat as processes rise.",
        parts,
        _FLAT_RULE,
    )


def _claim_18(s: _Sweep) -> Finding:
    def judge(spots: list[Spot]) -> _Part:
        last = spots[-1]
        gpu, cpu = last.median("gpu_percent"), last.median("preprocess_cpu_percent")
        measured = (
            f"with {last.count} actor{'s' if last.count > 1 else ''} GPU {number(gpu, '%')}, preprocessing {number(cpu, '%')} of the cores, "
            f"limited by {last.limit()}"
        )
        if gpu is None or cpu is None:
            return _cannot("the use of the GPU is not known", measured)
        return _Part(
            holds="yes" if gpu > cpu + POINTS and last.limit() == "train" else "no",
            measured=measured,
        )

    statement = (
        "GPU use for training is far above CPU use for preprocessing: training takes the time."
    )
    rule = f"Far above: by more than {POINTS:g} points, and the verdict names the train stage"
    return _finding(
        18, "18:27", statement, _training(s, judge, over="actors", fixed="workers"), rule
    )


def _claim_19(s: _Sweep) -> Finding:
    def judge(spots: list[Spot]) -> _Part:
        return (
            _falls(spots, s.where.cores, "workers")
            if len(spots) > 1
            else _cannot("needs 2 GPUs", _times(spots) + " workers")
        )

    parts = _training(s, judge, over="workers", fixed="actors")
    return _finding(
        19, "18:55", "1 process, more GPUs for training: total time falls.", parts, _FALLS_RULE
    )


def _claim_20(s: _Sweep) -> Finding:
    statement = "Add GPUs for training; do not spend GPU on preprocessing."
    rule = "By the planner: what one more GPU brings to training, against preprocessing that costs nothing at all"
    found = gpus(s.records, s.where)
    if not found:
        why = "not measured: --train" if s.where.gpus else "this machine has no GPU"
        return _finding(20, "19:30", statement, {"": _cannot(why)}, rule)
    parts = {
        gpu.backend: _Part(
            holds="yes" if gpu.training > gpu.preprocessing else "no",
            measured=f"{number(gpu.now)} images/s; {number(gpu.training)} with one more GPU to train, "
            f"{number(gpu.preprocessing)} if one did all preprocessing for nothing"
            + (
                ""
                if gpu.ops is None
                else f"; {number(gpu.ops)} measured with the ops on the GPU that trains"
            ),
        )
        for gpu in found
    }
    return _finding(20, "19:30", statement, parts, rule)


def _claim_21(s: _Sweep) -> Finding:
    statement = "Preprocess and train in one go where data is new each time; preprocess once and store it where the same data is trained on often."
    rule = "From how many epochs on storing has won, by CPU time and by the clock with a training as fast as data comes"
    found = [design for design in designs(s.records, s.where) if design.trainer is None]
    if not found:
        return _finding(
            21,
            "20:25",
            statement,
            {"": _cannot("storing and reading back were not measured")},
            rule,
        )
    parts = {}
    for design in found:
        by_cpu, by_clock = design.cpu.break_even_epochs, design.clock.break_even_epochs
        parts[design.backend] = _Part(
            holds="no" if by_cpu is None and by_clock is None else "yes",
            measured=f"by CPU time {epochs_from(by_cpu)}, by the clock {epochs_from(by_clock)}",
        )
    return _finding(21, "20:25", statement, parts, rule)


def epochs_from(epochs: float | None) -> str:
    """From which epoch on storing has won, in words."""
    return (
        "never"
        if epochs is None
        else f"from {number(math.ceil(epochs))} epoch{'' if epochs <= 1 else 's'} on"
    )


def findings(records: Sequence[Record], where: Where) -> list[Finding]:
    """Each claim that a sweep can judge, in the talk's order."""
    sweep = _Sweep(records=records, where=where)
    judges = (
        _claim_5,
        _claim_6,
        _claim_7,
        _claim_8,
        _claim_9,
        _claim_10,
        _claim_11,
        _claim_12,
        _claim_13,
        _claim_14,
    )
    return [
        judge(sweep) for judge in (*judges, _claim_17, _claim_18, _claim_19, _claim_20, _claim_21)
    ]
