"""The time that a sweep has left, against planted sweeps of which every cell's time is known."""

import random

import pytest

from raypipe.sweep.grid import Point, grid
from raypipe.sweep.remaining import Remaining
from raypipe.sweep.settings import Settings
from tests.sweep.played import IMAGES, Library, record, training

CORES = 2
LIBRARIES = {
    "opencv": Library(cpu_s=0.003, encode_s=0.002, waits_s=0.01),
    "torchvision": Library(cpu_s=0.004, encode_s=0.003, waits_s=0.01),
}
START_S = {"opencv": 0.3, "torchvision": 0.9}
"""CPU-bound start and end of an actor: on few cores they add up."""


def rows_of(point: Point) -> list[dict]:
    """What a measurement of this point finds."""
    library = LIBRARIES[point.backend]
    given = {"cores": CORES, "actors": point.actors}
    if point.workers:
        (row,) = (
            row
            for row in training(
                cores=CORES, device="cpu", actors=(point.actors,), workers=(point.workers,)
            )
            if row["backend"] == point.backend
            and (row["actors"], row["workers"]) == (point.actors, point.workers)
        )
        return [row]
    if point.kind == "stored":
        return [
            record(point.backend, library, writers=point.writers, kind="store", **given),
            record(point.backend, Library(cpu_s=library.stored_s), kind="stored", **given),
        ]
    return [record(point.backend, library, writers=point.writers, kind=point.kind, **given)]


def took_s(point: Point, rows: list[dict], noise: float) -> float:
    """A cell takes its work and, for each run, 2 s and the start of its actors."""
    actors = point.actors + point.writers
    fixed_s = 2 + START_S[point.backend] * actors + 15 * point.workers
    return noise * (sum(row["time_s"] for row in rows) + len(rows) * fixed_s)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("train", [False, True])
def test_the_time_left_is_right_within_a_third_from_the_fifth_cell_on(seed, train):
    writers = ("none", "one", "same", "fused")
    settings = Settings.of(
        input="demo", output="out", repeats=1, seed=seed, train=train, writers=writers
    )
    points = grid(settings, cores=CORES, gpus=0)
    chance = random.Random(seed)
    cells = [(point, rows_of(point)) for point in points]
    times = [took_s(point, rows, chance.uniform(0.95, 1.05)) for point, rows in cells]
    remaining = Remaining(CORES)
    for place, ((point, rows), took) in enumerate(zip(cells, times, strict=True), start=1):
        remaining.add(point, rows, took)
        if place in (5, 6, 7, 10, 20, 40, len(points) - 1):
            left_s = remaining.seconds(points[place:])
            assert left_s == pytest.approx(sum(times[place:]), rel=1 / 3), place


def test_before_a_cell_was_timed_nothing_is_said_and_rows_of_earlier_sweeps_help():
    one, two, four = (
        Point(kind="preprocess", backend="opencv", actors=n, threads=1) for n in (1, 2, 4)
    )
    remaining = Remaining(CORES)
    remaining.add(one, rows_of(one))
    assert remaining.seconds([two]) is None
    remaining.add(two, rows_of(two), 5.0 + rows_of(two)[0]["time_s"])
    work_s = IMAGES * LIBRARIES["opencv"].cpu_s / CORES
    assert remaining.seconds([four]) == pytest.approx(5.0 + work_s)
    assert remaining.seconds([]) == 0
