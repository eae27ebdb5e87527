from dataclasses import replace

import pytest

from raypipe import UsageError
from raypipe.insight.planner import StageCost
from raypipe.run.session import Pools, Session, ray_session, room_here, size_pools
from raypipe.run.settings import Settings

CLUSTER = Session(at_most=16, cpus_each=1.0, cores=16, nodes=4, joined=True, dashboard=None)
LAPTOP = Session(at_most=50, cpus_each=0.04, cores=2, nodes=1, joined=False, dashboard=None)


def costs(preprocess_ms: float, write_ms: float, *, waits: bool = False) -> list[StageCost]:
    """Of stages that compute, or that only wait."""
    return [
        StageCost(name=name, actors=1, busy_s=ms / 1000, cpu_s=0.0001 if waits else ms / 1000)
        for name, ms in (("preprocess", preprocess_ms), ("write", write_ms))
    ]


def settings(**given) -> Settings:
    return Settings(**({"input": "demo", "output": "out"} | given))


def test_more_than_a_cluster_has_is_refused_before_starting_with_the_numbers():
    with pytest.raises(UsageError, match=r"30 preprocess actors and 4 writers take 34 CPUs.* has 16"):
        size_pools(settings(actors=30, writers=4), None, CLUSTER, images=1000)
    assert size_pools(settings(actors=12, writers=4), None, CLUSTER, images=1000) == Pools(12, 4)


def test_a_machine_of_our_own_has_room_for_more_actors_than_cores_and_not_for_more_than_memory():
    assert room_here(settings(actors=6, writers=2)) >= 8
    with pytest.raises(UsageError, match=r"50000 preprocess actors and 2 writers need about 12500 GB"):
        room_here(settings(actors=50000, writers=2))
    with pytest.raises(UsageError, match=r"50000 preprocess actors and auto writers need about 12500 GB"):
        room_here(settings(actors=50000))


def test_auto_gives_each_stage_what_its_timing_asks_for():
    images = 10**9  # the start of an actor is nothing beside that
    assert size_pools(settings(), costs(2.0, 0.7), LAPTOP, images=images) == Pools(2, 1)  # computing: as many as cores
    waiting = size_pools(settings(), costs(170, 210, waits=True), LAPTOP, images=images)
    assert waiting.cpus == 50 and waiting.actors / waiting.writers == pytest.approx(170 / 210, rel=0.05)
    assert size_pools(settings(), costs(2.0, 0.7), CLUSTER, images=images) == Pools(12, 4)
    assert size_pools(settings(output=None), costs(2.0, 0.7)[:1], CLUSTER, images=images) == Pools(16, 0)


def test_auto_starts_no_actors_that_would_come_too_late():
    few = size_pools(settings(), costs(170, 210, waits=True), LAPTOP, images=100)
    assert few.cpus < 20


def test_what_was_asked_for_is_not_changed_by_the_timing():
    asked = settings(actors=3)
    assert size_pools(asked, costs(170, 210, waits=True), replace(LAPTOP, at_most=10), images=10**9) == Pools(3, 4)
    assert size_pools(replace(asked, writers=2), costs(170, 210, waits=True), LAPTOP, images=10**9) == Pools(3, 2)


def test_without_a_timing_there_is_a_rule_of_thumb():
    assert size_pools(settings(), None, LAPTOP, images=100) == Pools(2, 1)
    assert size_pools(settings(), None, CLUSTER, images=100) == Pools(12, 4)
    assert size_pools(settings(output=None), None, CLUSTER, images=100) == Pools(16, 0)


def test_a_session_within_another_is_that_one_with_its_room(session):
    with ray_session(settings(actors=2, writers=2)) as outer:
        with ray_session(settings(actors=50000)) as inner:
            assert inner is outer
        with ray_session(settings()) as again:  # the first to end has ended nothing
            assert again is outer
    with ray_session(settings()) as later:
        assert later is not outer
