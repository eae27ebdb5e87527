import pytest

from raypipe.insight.planner import CORES, StageCost, bound, changes


def cost(name: str, actors: int, busy_s: float, cpu_s: float) -> StageCost:
    return StageCost(name=name, actors=actors, busy_s=busy_s, cpu_s=cpu_s)


def test_the_stage_with_the_least_actors_for_its_cost_limits():
    rate, limit = bound([cost("preprocess", 4, 0.010, 0.001), cost("write", 1, 0.020, 0.001)], cores=8)
    assert (rate, limit) == (pytest.approx(50), "write")


def test_the_cores_limit_when_all_stages_together_need_more_cpu_than_there_is():
    rate, limit = bound([cost("preprocess", 8, 0.010, 0.010), cost("write", 8, 0.010, 0.010)], cores=2)
    assert (rate, limit) == (pytest.approx(100), CORES)


def test_a_stage_that_cost_nothing_limits_nothing():
    assert bound([cost("preprocess", 1, 0.0, 0.0)], cores=2) == (0.0, CORES)
    assert changes([cost("preprocess", 1, 0.0, 0.0)], 2, 10.0) == []


def test_advice_for_a_waiting_writer_is_another_writer():
    stages = [cost("preprocess", 2, 0.002, 0.002), cost("write", 1, 0.010, 0.001)]
    best = changes(stages, cores=8, measured=95.0)[0]
    assert best.change == "write actors 1 -> 2"
    assert best.predicted_images_per_s == pytest.approx(190)  # twice what was measured, not twice what the model says


def test_more_actors_are_no_advice_when_the_cores_are_full():
    # 4 actors on 2 cores: each image's busy time is twice its CPU time, the rest is waiting for a core.
    stages = [cost("preprocess", 4, 0.004, 0.002)]
    found = changes(stages, cores=2, measured=1000.0)
    assert [(c.change, c.predicted_images_per_s) for c in found] == [
        ("cores 2 -> 3", pytest.approx(1500)),
        ("preprocess actors 4 -> 5", pytest.approx(1000)),
    ]
