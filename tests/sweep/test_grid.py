"""The points of a sweep."""

from collections import Counter
from dataclasses import replace

from raypipe.sweep.grid import Point, fits, grid, largest
from raypipe.sweep.settings import Settings


def points(**given) -> list[Point]:
    asked = Settings.of(
        input="demo", output="out", **{"repeats": 1, "backends": ("opencv",)} | given
    )
    return grid(asked, cores=4, gpus=0)


def test_the_grid_has_each_point_once_a_repeat_in_an_order_of_its_own():
    found = points(actors=(1, 2, 4), backends=("opencv", "torchvision"), repeats=3)
    each = [
        [replace(point, repeat=0) for point in found if point.repeat == repeat]
        for repeat in range(3)
    ]
    assert set(each[0]) == set(each[1]) == set(each[2])
    assert each[0] != each[1] != each[2]
    assert set(Counter(found).values()) == {1}
    assert [point.repeat for point in found] == sorted(point.repeat for point in found)
    pairs = {(point.actors, point.writers) for point in found if point.kind == "preprocess"}
    assert pairs == {
        (1, 0),
        (2, 0),
        (4, 0),
        (1, 1),
        (2, 1),
        (4, 1),
        (2, 2),
        (4, 4),
    }  # one writer and as many are the same for 1 actor


def test_one_point_of_each_kind_comes_first():
    found = points(train=True, repeats=2)
    assert {point.kind for point in found[:3]} == {"preprocess", "stored", "train"}


def test_other_numbers_of_threads_are_measured_without_writers():
    found = points(actors=(1, 2), threads=(1, 8))
    assert {(p.threads, p.writers) for p in found if p.kind == "preprocess"} == {
        (1, 0),
        (8, 0),
        (1, 1),
        (1, 2),
    }


def test_storing_is_measured_with_as_many_actors_as_cores_and_not_at_all_without_writing():
    assert [(p.actors, p.writers) for p in points(actors=(1, 2, 4, 8)) if p.kind == "stored"] == [
        (4, 4)
    ]
    assert [p.actors for p in points(actors=(8, 16)) if p.kind == "stored"] == [8]
    assert not [p for p in points(writers=("none",)) if p.kind == "stored"]


def test_training_is_measured_over_actors_with_one_worker_and_over_workers_with_one_actor():
    found = [p for p in points(train=True, train_actors=(1, 4)) if p.kind == "train"]
    assert {(p.actors, p.workers, p.device) for p in found} == {
        (1, 1, "cpu"),
        (4, 1, "cpu"),
        (1, 2, "cpu"),
    }
    on_gpus = grid(
        Settings.of(input="demo", output="out", train=True, train_actors=(1, 4), repeats=1),
        cores=4,
        gpus=3,
    )
    assert {(p.actors, p.workers, p.device) for p in on_gpus if p.kind == "train"} == {
        *((1, n, "gpu") for n in (1, 2, 3)),
        (4, 1, "gpu"),
    }
    assert [p.actors for p in on_gpus if p.kind == "ops" and p.backend == "opencv"] == [1]


def test_each_actor_of_the_largest_point_gets_several_shards_and_a_small_grid_can_grow():
    assert Settings.of(input="demo", output="out").rows == 25  # 40 shards for 20 actors
    assert Settings.of(input="demo", output="out", actors=(1,)).rows == 25
    assert Settings.of(input="demo", output="out", actors=(1, 50)).rows == 10
    assert Settings.of(input="demo", output="out", limit=10).rows == 1
    assert Settings.of(input="demo", output="out", shard_rows=5).rows == 5


def test_points_without_memory_for_their_actors_are_left_out_on_a_machine_of_our_own():
    wanted = Settings.of(input="demo", output="out", actors=(2, 100_000))
    assert largest(wanted, joined=True).actors == 100_000
    most = largest(wanted, joined=False)
    assert (most.actors, most.writers) == (2, 2)
    assert {fits(point) for point in grid(wanted, cores=2, gpus=0)} == {True, False}
