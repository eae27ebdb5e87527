from itertools import pairwise

import pytest

from raypipe.insight.planner import (
    CORES,
    Machine,
    StageCost,
    best,
    better,
    bound,
    changes,
    designs,
    of_report,
    outlook,
    uncontended,
)


def cost(name: str, actors: int, busy_s: float, cpu_s: float) -> StageCost:
    return StageCost(name=name, actors=actors, busy_s=busy_s, cpu_s=cpu_s)


def test_the_stage_with_the_least_actors_for_its_cost_limits():
    rate, limit = bound(
        [cost("preprocess", 4, 0.010, 0.001), cost("write", 1, 0.020, 0.001)], Machine(cores=8)
    )
    assert (rate, limit) == (pytest.approx(50), "write")


def test_the_cores_limit_when_all_stages_together_need_more_cpu_than_there_is():
    rate, limit = bound(
        [cost("preprocess", 8, 0.010, 0.010), cost("write", 8, 0.010, 0.010)], Machine(cores=2)
    )
    assert (rate, limit) == (pytest.approx(100), CORES)


def test_a_stage_that_cost_nothing_limits_nothing():
    assert bound([cost("preprocess", 1, 0.0, 0.0)], Machine(cores=2)) == (0.0, CORES)
    assert changes([cost("preprocess", 1, 0.0, 0.0)], Machine(cores=2), 10.0) == []


def test_advice_for_a_waiting_writer_is_another_writer():
    stages = [cost("preprocess", 2, 0.002, 0.002), cost("write", 1, 0.010, 0.001)]
    best = changes(stages, Machine(cores=8), measured=95.0)[0]
    assert best.change == "write actors 1 -> 2"
    assert best.predicted_images_per_s == pytest.approx(
        190
    )  # twice what was measured, not twice what the model says


def test_more_actors_are_no_advice_when_the_cores_are_full():
    # 4 actors on 2 cores: an image is busy for twice its CPU time, the rest waits for a core.
    stages = [cost("preprocess", 4, 0.004, 0.002)]
    found = changes(stages, Machine(cores=2), measured=1000.0)
    assert [(c.change, c.predicted_images_per_s) for c in found] == [
        ("cores 2 -> 3", pytest.approx(1500)),
        ("preprocess actors 4 -> 5", pytest.approx(1000)),
    ]


def test_waiting_for_a_core_is_taken_off_where_it_was_measured():
    contended = StageCost(name="preprocess", actors=8, busy_s=0.030, cpu_s=0.004, core_wait_s=0.006)
    assert uncontended([contended], 2)[0].busy_s == pytest.approx(
        0.024
    )  # 20 ms of it wait for a disk: more actors do help
    unknown = cost("preprocess", 8, 0.030, 0.008)
    assert uncontended([unknown], 2)[0].busy_s == pytest.approx(0.008)
    assert uncontended([unknown], 64)[0].busy_s == pytest.approx(0.030)


def test_the_best_allocation_is_the_best_of_all_that_there_are():
    for b1, u1, b2, u2, cores, room in [
        (0.17, 0.001, 0.21, 0.001, 2, 24),
        (0.004, 0.003, 0.02, 0.001, 8, 12),
        (0.01, 0.01, 0.001, 0.001, 4, 9),
    ]:
        stages = [cost("preprocess", 1, b1, u1), cost("write", 1, b2, u2)]
        machine = Machine(cores=cores, actors=room)
        rates = [
            bound([cost("preprocess", p, b1, u1), cost("write", w, b2, u2)], machine)[0]
            for p in range(1, room)
            for w in range(1, room - p + 1)
        ]
        counts = best(stages, machine)
        found, _ = bound(
            [
                cost("preprocess", counts["preprocess"], b1, u1),
                cost("write", counts["write"], b2, u2),
            ],
            machine,
        )
        assert found >= 0.95 * max(rates)
        assert sum(counts.values()) <= room


def test_a_stage_that_is_fixed_stays_and_the_others_get_no_more_than_it_can_use():
    stages = [cost("preprocess", 3, 0.1, 0.001), cost("write", 1, 0.2, 0.001)]
    assert best(stages, Machine(cores=2, actors=50), fixed={"preprocess"}) == {
        "preprocess": 3,
        "write": 6,
    }


def test_few_images_are_not_worth_many_actors():
    stages = [cost("preprocess", 1, 0.2, 0.001)]
    machine = Machine(cores=2, actors=50)
    assert best(stages, machine)["preprocess"] == 50
    assert (
        best(stages, machine, images=100, start_s=1.0)["preprocess"] == 6
    )  # 100 * 0.2 / n + n / 2 is least at 6.3


def test_a_running_pool_is_changed_only_for_a_gain_that_is_worth_it():
    machine = Machine(cores=2, actors=20)
    assert (
        better([cost("preprocess", 9, 0.17, 0.001), cost("write", 11, 0.21, 0.001)], machine)
        is None
    )
    assert (
        better([cost("preprocess", 9, 0.17, 0.001), cost("write", 11, 0.22, 0.001)], machine)
        is None
    )
    # The seventeenth actor brings 6%; the thirty-first 3%, which is noise.
    few, many = (
        [cost("preprocess", count, 1.0, 0.001), cost("write", 1, 0.02, 0.001)] for count in (16, 30)
    )
    assert better(few, Machine(cores=2, actors=18)) == {"preprocess": 17, "write": 1}
    assert better(many, Machine(cores=2, actors=32)) is None
    # Actors move to the stage that needs them; where there is room none has to go.
    assert better([cost("preprocess", 16, 0.1, 0.001), cost("write", 4, 0.1, 0.001)], machine) == {
        "preprocess": 10,
        "write": 10,
    }
    wide = Machine(cores=2, actors=40)
    assert better([cost("preprocess", 16, 0.1, 0.001), cost("write", 4, 0.1, 0.001)], wide) == {
        "preprocess": 20,
        "write": 20,
    }


def test_an_outlook_on_another_machine_with_gpus():
    stages = [
        cost("preprocess", 2, 0.004, 0.004),
        StageCost(name="train", actors=1, busy_s=0.010, cpu_s=0.001, on_gpu=True),
    ]
    there = outlook(stages, Machine(cores=64, actors=64, gpus=8))
    assert there.counts == {"preprocess": 4, "train": 8}
    assert (there.images_per_s, there.limit) == (pytest.approx(800), "train")
    gains = dict(there.gains)
    assert gains["one more GPU, and the best actors for it"] == pytest.approx(900)
    assert gains["one more core, and the best actors for it"] == pytest.approx(800)
    small = outlook(stages, Machine(cores=2, actors=2, gpus=8))
    assert small.limit == CORES and 2 / 0.005 > small.images_per_s > 0.9 * 2 / 0.005


def test_storing_pays_from_the_epoch_on_in_which_what_it_saves_exceeds_what_it_costs():
    preprocess = cost("preprocess", 4, 0.020, 0.001)
    write, stored = cost("write", 1, 0.002, 0.001), cost("stored", 1, 0.002, 0.001)
    machine = Machine(cores=8, actors=5)
    train = cost("train", 1, 0.002, 0.001)
    found = designs(
        images=1000, preprocess=preprocess, write=write, stored=stored, train=train, machine=machine
    )
    # 5 ms an image once and in every epoch, or 2 ms, for then the training limits.
    assert (found.once_s, found.continuous_s, found.stored_s) == (
        pytest.approx(5),
        pytest.approx(5),
        pytest.approx(2),
    )
    assert found.break_even_epochs == pytest.approx(5 / 3)
    slower = designs(
        images=1000,
        preprocess=preprocess,
        write=write,
        stored=stored,
        train=cost("train", 1, 0.006, 0.001),
        machine=machine,
    )
    assert slower.break_even_epochs is None  # the training limits either way


def test_advice_for_a_stage_on_gpus_is_another_worker_with_its_gpu():
    stages = [
        cost("preprocess", 8, 0.004, 0.004),
        StageCost(name="train", actors=1, busy_s=0.010, cpu_s=0.001, on_gpu=True),
    ]
    first = changes(stages, Machine(cores=16), measured=100.0)[0]
    assert (first.change, first.predicted_images_per_s) == (
        "train workers 1 -> 2, with a GPU more",
        pytest.approx(200),
    )


def test_actors_that_wait_and_compute_get_in_each_others_way_near_the_point_where_the_cores_limit():
    # 12-megapixel PNGs that wait 0.48 s and need a core for 0.2 s, on 2 cores.
    # Measured were 8.1, 9.2 and 8.8 images/s with 7, 8 and 9 actors.
    def rate(actors: int) -> float:
        stages = [cost("preprocess", actors, 0.68, 0.20), cost("write", 2, 0.04, 0.02)]
        return bound(stages, Machine(cores=2))[0]

    assert [rate(actors) for actors in (7, 8, 9)] == [
        pytest.approx(measured, rel=0.1) for measured in (8.1, 9.2, 8.8)
    ]
    assert rate(1) == pytest.approx(1 / 0.68)  # alone nobody is in its way
    rates = [rate(actors) for actors in range(1, 60)]
    assert all(after > 0.999999 * before for before, after in pairwise(rates)) and rates[
        -1
    ] == pytest.approx(2 / 0.22, rel=0.01)
    assert rate(10_000) == pytest.approx(2 / 0.22)
    # Without waiting there is nothing to overlap: as many actors as cores are enough.
    assert bound([cost("preprocess", 2, 0.01, 0.01)], Machine(cores=2)) == (
        pytest.approx(200),
        CORES,
    )
    assert best([cost("preprocess", 1, 0.01, 0.01)], Machine(cores=2, actors=50))["preprocess"] == 2


def test_ray_itself_takes_a_share_of_the_cores():
    stages = [cost("preprocess", 8, 0.010, 0.010)]
    assert bound(stages, Machine(cores=2, overhead_s=0.002))[0] == pytest.approx(2 / 0.012)


def test_what_a_run_reached_of_the_model_is_expected_elsewhere_too():
    stage = {
        "name": "write",
        "busy_s_per_image": 0.02,
        "cpu_s_per_image": 0.001,
        "actors": {"end": 2, "max": 2},
        "busy": 0.95,
    }
    report = {"stages": [stage], "hardware": {"cores": 4}, "work_cpu_percent": 5.0}
    costs, machine = of_report(report)
    assert outlook(costs, machine, {"write": 4}).images_per_s == pytest.approx(0.95 * 4 / 0.02)
    costs, machine = of_report(
        report | {"stages": [stage | {"busy": 0.3}]}
    )  # too short a run, or one that waited for its input
    assert bound(costs, machine)[0] == pytest.approx(0.9 * 2 / 0.02)
    full = stage | {"busy": 0.99, "cpu_s_per_image": 0.02, "actors": {"end": 8, "max": 8}}
    costs, machine = of_report(report | {"stages": [full], "work_cpu_percent": 97.0})
    assert bound(costs, machine) == (pytest.approx(0.97 * 4 / 0.02), CORES)


def test_a_report_without_finished_shards_has_no_costs():
    stage = {
        "name": "preprocess",
        "busy_s_per_image": None,
        "cpu_s_per_image": None,
        "actors": {"end": 2, "max": 2},
    }
    with pytest.raises(ValueError, match="no stage has finished"):
        of_report({"stages": [stage], "hardware": {"cores": 2}})
