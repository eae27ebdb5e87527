"""The report: the verdict over single stages, and how long the work alone took."""

from dataclasses import replace

import pytest

from raypipe.insight import planner
from raypipe.insight.report import Clock, Counts, build
from raypipe.insight.states import PoolView, Sample, Shares, Snapshot, Verdict
from raypipe.insight.terminal import notes
from raypipe.insight.verdict import Measured, judge

Seen = tuple[planner.StageCost, Shares]


def stage(
    name: str,
    *,
    actors: int,
    busy_ms: float,
    cpu_ms: float,
    busy: float = 0.95,
    on_gpu: bool = False,
) -> Seen:
    cost = planner.StageCost(
        name=name,
        actors=actors,
        busy_s=busy_ms / 1000,
        cpu_s=cpu_ms / 1000,
        core_wait_s=0.0,
        on_gpu=on_gpu,
    )
    return cost, Shares(busy=busy, starved=1 - busy, blocked=0.0)


def verdict(stages: list[Seen], cores: float, measured: float, **more: float) -> Verdict:
    costs = [cost for cost, _ in stages]
    shares = {cost.name: found for cost, found in stages}
    return judge(costs, shares, Measured(cores=cores, images_per_s=measured, seconds=60.0, **more))


def test_a_stage_that_mostly_waits_is_said_to_wait_and_for_what():
    slow_input = verdict(
        [
            stage("preprocess", actors=4, busy_ms=40, cpu_ms=4),
            stage("write", actors=2, busy_ms=2, cpu_ms=2),
        ],
        8,
        95.0,
    )
    assert slow_input.stage == "preprocess"
    assert "90% of that it waited for the input, not for a core." in slow_input.reason
    slow_store = verdict(
        [
            stage("preprocess", actors=4, busy_ms=4, cpu_ms=4),
            stage("write", actors=1, busy_ms=20, cpu_ms=2),
        ],
        8,
        48.0,
    )
    assert (
        slow_store.stage == "write" and "90% of that it waited for the store" in slow_store.reason
    )
    working = verdict([stage("preprocess", actors=1, busy_ms=4, cpu_ms=4)], 8, 240.0)
    assert working.stage == "preprocess" and "waited" not in working.reason


@pytest.mark.parametrize(
    ("on_gpu", "change"),
    [(True, "train workers 1 -> 2, with a GPU more"), (False, "train actors 1 -> 2")],
)
def test_where_training_limits_the_advice_is_another_worker(on_gpu, change):
    stages = [
        stage("preprocess", actors=8, busy_ms=4, cpu_ms=4, busy=0.5),
        stage("train", actors=1, busy_ms=10, cpu_ms=1, on_gpu=on_gpu),
    ]
    said = verdict(stages, 16, 95.0)
    assert said.stage == "train"
    assert said.advice[0].change == change
    assert said.advice[0].predicted_images_per_s == pytest.approx(190)


def test_what_ray_takes_of_the_cores_counts_where_it_is_measured():
    stages = [
        stage("preprocess", actors=2, busy_ms=4.2, cpu_ms=3.0),
        stage("write", actors=2, busy_ms=1.5, cpu_ms=1.04),
    ]
    assert verdict(stages, 2, 430.0).stage == "preprocess"
    assert "The 2 cores limit" in verdict(stages, 2, 430.0, overhead_s=0.0004).reason


# --- the work alone: from when the last actor was ready, to the last output ---------------------


def sample(stage: str, actor: str, at: float, *, busy: float = 0.0, node: str = "here") -> Sample:
    """Of a node of 2 cores that was busy for so many CPU seconds; its clock began at 0."""
    return Sample(
        stage=stage,
        actor=actor,
        node=node,
        at=at,
        calls=1,
        images=10,
        busy_s=1.0,
        under_way_s=0.0,
        cpu_s=1.0,
        core_wait_s=0.0,
        bytes_in=0,
        bytes_out=0,
        rss_bytes=10,
        rss_peak_bytes=10,
        node_cpu_busy_s=busy,
        node_cpu_total_s=2 * at,
    )


def built(
    first: list[Sample],
    last: list[Sample],
    *,
    outputs: list[tuple[float, int]],
    pools: dict[str, PoolView] | None = None,
    **more,
) -> dict:
    pools = pools or {"preprocess": PoolView(start=2), "write": PoolView(start=1)}
    return build(
        run_id="x",
        settings={},
        versions={},
        hardware={"cores": 2},
        counts=Counts(images_in=20, images_out=20, rejects_by_reason={}),
        clock=Clock(wall_s=30.0, setup_s=1.0, ready_s=2.0, outputs=outputs),
        cpu_percent=50.0,
        stage_names=["preprocess", "write"],
        snapshot=Snapshot(actors=tuple(last), first=tuple(first), started=100.0, pools=pools),
        **more,
    )


def test_work_is_counted_from_when_the_last_actor_could_begin_to_the_last_output():
    first = [
        sample("preprocess", "a", 101, busy=1),
        sample("preprocess", "b", 104, busy=6),
        sample("write", "c", 106, busy=10),
    ]
    last = [
        sample("preprocess", "a", 120, busy=30),
        sample("preprocess", "b", 121, busy=32),
        sample("write", "c", 126, busy=40),
    ]
    found = built(first, last, outputs=[(15.0, 10), (26.0, 10)])
    assert found["work_s"] == 20.0  # 106 to 126; not from 101, and not the mean
    assert found["work_cpu_percent"] == 100 * (40 - 10) / (2 * 20)


def test_actors_that_came_later_do_not_shorten_the_work():
    first = [
        sample("preprocess", "a", 101),
        sample("preprocess", "b", 104),
        sample("preprocess", "c", 118),
        sample("write", "d", 102),
    ]
    assert built(first, first, outputs=[(20.0, 20)])["work_s"] == 16.0


def test_work_of_several_nodes_is_their_cpu_together():
    first = [
        sample("preprocess", "a", 101, busy=0),
        sample("preprocess", "b", 101, busy=0, node="there"),
        sample("write", "c", 101),
    ]
    last = [
        sample("preprocess", "a", 111, busy=20),
        sample("preprocess", "b", 111, busy=0, node="there"),
        sample("write", "c", 111),
    ]
    assert built(first, last, outputs=[(11.0, 20)])["work_cpu_percent"] == 50.0


@pytest.mark.parametrize(("idle_s", "told"), [(0.0, True), (12.0, False), (30.0, False)])
def test_cpu_that_was_neither_the_stages_nor_rays_is_said(idle_s, told):
    first = [
        sample("preprocess", "a", 101),
        sample("preprocess", "b", 101),
        sample("write", "c", 101),
    ]
    # 20 s on 2 cores: 16 CPU seconds are the stages', 4.5 the end of three actors, 12.2 Ray's.
    last = [
        replace(sample("preprocess", "a", 121, busy=40 - idle_s), busy_s=10.0, cpu_s=6.0),
        replace(sample("preprocess", "b", 121, busy=40 - idle_s), busy_s=10.0, cpu_s=6.0),
        replace(sample("write", "c", 121, busy=40 - idle_s), busy_s=10.0, cpu_s=4.0),
    ]
    pools = {
        "preprocess": PoolView(start=2, min=2, max=2, end=2, actor_s=40.0),
        "write": PoolView(start=1, min=1, max=1, end=1, actor_s=20.0),
    }
    reason = built(first, last, outputs=[(11.0, 10), (21.0, 10)], pools=pools)["verdict"]["reason"]
    assert ("Other programs held about 18% of the machine's CPU" in reason) == told, reason
    consumed = built(first, last, outputs=[(11.0, 10), (21.0, 10)], pools=pools, driver_cpu_s=8.0)[
        "verdict"
    ]["reason"]
    assert "Other programs" not in consumed


def test_work_that_was_done_before_all_actors_were_there_has_no_time():
    first = [
        sample("preprocess", "a", 101),
        sample("preprocess", "b", 104),
        sample("write", "c", 109),
    ]
    assert built(first, first, outputs=[(8.0, 20)])["work_s"] is None
    assert built([], [], outputs=[(8.0, 20)])["work_s"] is None
    assert built(first, first, outputs=[])["work_s"] is None


def test_what_was_left_out_dropped_and_moved_is_told():
    found = {
        "skipped": {".txt": 1, ".cr2": 12},
        "boxes_dropped": 3,
        "boxes_from": {"stored": 2, "scaled": 1, "unclear": 4},
    }
    assert notes(found) == [
        "left out of the listing: 12 .cr2, 1 .txt",
        "3 boxes could not be used and were dropped (boxes_dropped.parquet)",
        "the boxes of 3 images were drawn in another frame than the picture's, and moved",
        "the boxes of 4 images are taken as upright: sizes cannot tell whether they are",
    ]
    assert notes({"skipped": {}, "boxes_dropped": 0, "boxes_from": {}}) == notes({}) == []
