"""How long the rest of a sweep takes: of each cell a fixed cost, and images over a rate.

The mean so far says little: a cell of 20 actors takes several times as long as one of a single
actor.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, mean

from raypipe.insight import forms, planner
from raypipe.insight.markup import known
from raypipe.insight.planner import Machine, StageCost
from raypipe.sweep.advice import costs
from raypipe.sweep.curves import Record, Spot
from raypipe.sweep.grid import Point

TRAINING = 5.0
"""A training starts as slowly as so many of the smallest runs, until one was measured."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A cell that was measured. `took_s`: all of it, the start of actors too; None: not known."""

    point: Point
    rows: Sequence[Record]
    took_s: float | None

    @property
    def work_s(self) -> float:
        return sum(known(row["time_s"]) or 0.0 for row in self.rows)

    @property
    def fixed_s(self) -> float | None:
        """Of one of its runs, and of a training for each of its workers."""
        if self.took_s is None:
            return None
        parts = len(self.rows) * max(self.point.workers, 1)
        return max(self.took_s - self.work_s, 0.0) / parts


def _actors(point: Point) -> int:
    return point.actors + point.writers


def _runs(point: Point) -> int:
    return 2 if point.kind == "stored" else 1


def _counts(point: Point) -> dict[str, int]:
    """Actors by stage; of a fused one, by the steps that its actors do."""
    writers = point.actors if point.kind == "fused" else point.writers
    counts = {"preprocess": point.actors, "write": writers, "train": point.workers}
    return {stage: count for stage, count in counts.items() if count}


def _trains(point: Point) -> bool:
    return point.workers > 0


class Remaining:
    """Estimates from the cells that were measured."""

    def __init__(self, cores: float):
        self._cores = cores
        self._cells: list[_Cell] = []

    def add(self, point: Point, rows: Sequence[Record], took_s: float | None = None) -> None:
        """A cell was measured: its rows, and the seconds it took in all, where that is known."""
        self._cells.append(_Cell(point=point, rows=rows, took_s=took_s))

    def seconds(self, points: Iterable[Point]) -> float | None:
        """What these points will take together; None: no cell was timed yet."""
        if all(cell.took_s is None for cell in self._cells):
            return None
        return sum(self._fixed_s(point) + self._work_s(point) for point in points)

    def _fixed_s(self, point: Point) -> float:
        """Starting and ending actors: a line over their number, by library where that is known.

        Of a training, the fixed costs of a worker count for each.
        """
        timed = [cell for cell in self._cells if cell.fixed_s is not None]
        alike = [cell for cell in timed if _trains(cell.point) == _trains(point)]
        cells = alike or timed
        own = [cell for cell in cells if cell.point.backend == point.backend]
        several = len({_actors(cell.point) for cell in own}) > 1
        cells = own if several and len(own) > 2 else cells
        fixed_s = _line(cells, _actors(point))
        if not alike and _trains(point):
            fixed_s += (TRAINING - 1) * _line(cells, 1)
        return _runs(point) * max(point.workers, 1) * fixed_s

    def _work_s(self, point: Point) -> float:
        """Time of the most similar cell, scaled by what the model says of both."""
        like = min(self._cells, key=lambda cell: _distance(cell.point, point))
        theirs, ours = self._model_s(like.point), self._model_s(point)
        if not theirs or not ours:
            return like.work_s
        return like.work_s * ours / theirs

    def _model_s(self, point: Point) -> float | None:
        """Seconds an image by the planner, from costs of the most similar cells with each stage."""
        stages = [self._cost(stage, count, point) for stage, count in _counts(point).items()]
        found = [stage for stage in stages if stage is not None]
        if len(found) < len(stages):
            return None
        if point.kind == "fused":
            found = forms.staged(found, ["preprocess+write"])
        rate = planner.bound(found, Machine(cores=self._cores))[0]
        return _runs(point) / rate if rate else None

    def _cost(self, stage: str, count: int, point: Point) -> StageCost | None:
        """Of the most similar cell that has the stage."""
        has = [cell for cell in self._cells if known(cell.rows[0].get(f"{stage}_busy_s"))]
        if not has:
            return None
        like = min(has, key=lambda cell: _distance(cell.point, point))
        spots = [Spot(count=like.point.actors, records=[like.rows[0]])]
        found = costs(spots, self._cores, (stage,))
        return planner.with_actors(found, {stage: count})[0] if found else None


def _distance(one: Point, other: Point) -> tuple[bool, bool, bool, float]:
    """How little two points have in common: kind, library and stages first, then counts."""
    counts = zip(_counts(one).values(), _counts(other).values(), strict=False)
    return (
        one.kind != other.kind,
        one.backend != other.backend,
        _counts(one).keys() != _counts(other).keys(),
        sum(abs(math.log(a / b)) for a, b in counts),
    )


def _line(cells: Sequence[_Cell], actors: int) -> float:
    """Fixed seconds of a run with so many actors, from those of others."""
    pairs = [(_actors(cell.point), cell.fixed_s or 0.0) for cell in cells]
    if len({count for count, _ in pairs}) < 2:
        return mean(fixed_s for _, fixed_s in pairs)
    slope, intercept = linear_regression(*zip(*pairs, strict=True))
    least = min(fixed_s for _, fixed_s in pairs)
    if slope < 0 or intercept < 0:  # noise: through 0, or the mean
        total = sum(count for count, _ in pairs)
        slope = sum(fixed_s for _, fixed_s in pairs) / total if intercept < 0 else 0.0
        intercept = 0.0 if intercept < 0 else mean(fixed_s for _, fixed_s in pairs)
    return max(intercept + slope * actors, least / 2)
