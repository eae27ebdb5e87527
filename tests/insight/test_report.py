"""The verdict: which stage limits, what it waits for, and what would help."""

import pytest

from raypipe.insight.report import verdict


def stage(name: str, *, actors: int, busy_ms: float, cpu_ms: float, busy: float = 0.95, gpu_percent: float | None = None) -> dict:
    return {
        "name": name,
        "actors": {"start": actors, "min": actors, "max": actors, "end": actors},
        "busy_s_per_image": busy_ms / 1000,
        "cpu_s_per_image": cpu_ms / 1000,
        "core_wait_s_per_image": 0.0,
        "cpu_percent": 10.0,
        "gpu_percent": gpu_percent,
        "busy": busy,
        "starved": 1 - busy,
        "blocked": 0.0,
    }


def test_a_stage_that_mostly_waits_is_said_to_wait_and_for_what():
    slow_input = verdict(
        [stage("preprocess", actors=4, busy_ms=40, cpu_ms=4), stage("write", actors=2, busy_ms=2, cpu_ms=2)], 8, 95.0
    )
    assert slow_input["stage"] == "preprocess"
    assert "90% of that it waited for the input, not for a core." in slow_input["reason"]
    slow_store = verdict(
        [stage("preprocess", actors=4, busy_ms=4, cpu_ms=4), stage("write", actors=1, busy_ms=20, cpu_ms=2)], 8, 48.0
    )
    assert slow_store["stage"] == "write" and "90% of that it waited for the store" in slow_store["reason"]
    working = verdict([stage("preprocess", actors=1, busy_ms=4, cpu_ms=4)], 8, 240.0)
    assert working["stage"] == "preprocess" and "waited" not in working["reason"]


@pytest.mark.parametrize(("gpu", "change"), [(97.0, "train workers 1 -> 2, with a GPU more"), (None, "train actors 1 -> 2")])
def test_where_training_limits_the_advice_is_another_worker(gpu, change):
    stages = [
        stage("preprocess", actors=8, busy_ms=4, cpu_ms=4, busy=0.5),
        stage("train", actors=1, busy_ms=10, cpu_ms=1, gpu_percent=gpu),
    ]
    said = verdict(stages, 16, 95.0)
    assert said["stage"] == "train"
    assert said["advice"][0]["change"] == change and said["advice"][0]["predicted_images_per_s"] == pytest.approx(190)
