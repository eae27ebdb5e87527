"""Counts that are asked for, and those that the cluster has room for."""

from raypipe.insight.room import Room
from raypipe.insight.states import PoolView
from raypipe.run.live.steering import Facts, Steering


def moving(**given) -> Steering:
    """Of a run with 6 preprocess and 2 write actors, on a cluster of 8 CPUs that may change."""
    asked = {"preprocess": 6, "write": 2}
    facts = Facts(**{"at_most": 8, "cores": 8, "asked": asked, "moves": True} | given)
    steering = Steering(facts, 0.0)
    for stage, count in asked.items():
        steering.seen(stage, PoolView(start=count))
    return steering


def test_counts_shrink_with_the_cluster_and_grow_again():
    steering = moving()
    assert "9 actors, but there is room for 8" in steering.scale({"preprocess": 7}, 1.0)
    steering.resize(Room(actors=4, cores=4), 2.0)
    assert steering.wanted == {"preprocess": 3, "write": 1}
    # Less than was asked for is no refusal, though it is more than there is room for.
    assert steering.scale({"preprocess": 5}, 3.0) == {"preprocess": 5, "write": 2}
    assert "room for 4" in steering.scale({"preprocess": 6}, 3.0)
    assert steering.wanted == {"preprocess": 3, "write": 1}
    steering.resize(Room(actors=12, cores=12), 4.0)
    assert steering.wanted == {"preprocess": 5, "write": 2}
    assert steering.scale({"preprocess": 10}, 5.0) == {"preprocess": 10, "write": 2}
    changes = [(event.stage, event.before, event.after, event.by) for event in steering.events]
    assert changes == [
        ("preprocess", 6, 3, "cluster"),
        ("write", 2, 1, "cluster"),
        ("preprocess", 6, 5, "user"),
        ("preprocess", 3, 5, "cluster"),
        ("write", 1, 2, "cluster"),
        ("preprocess", 5, 10, "user"),
    ]


def test_with_an_autoscaler_more_may_be_asked_for_than_is_there_within_its_bounds():
    steering = moving(grows=True, most=12)
    assert steering.scale({"preprocess": 10}, 1.0) == {"preprocess": 10, "write": 2}
    assert steering.wanted == {"preprocess": 6, "write": 2}
    assert "with all nodes that its autoscaler may add" in steering.scale({"preprocess": 11}, 1.0)
    steering.resize(Room(actors=12, cores=12), 2.0)
    assert steering.wanted == {"preprocess": 10, "write": 2}
    # Where the bounds are not known, only the cluster can tell.
    assert moving(grows=True).scale({"preprocess": 99}, 1.0) == {"preprocess": 99, "write": 2}


def test_workers_of_a_training_keep_their_cpus():
    steering = moving(fixed={"train": 4}, at_most=12)
    assert "11 actors, but" not in str(steering.scale({"preprocess": 6}, 1.0))
    assert "13 actors, but there is room for 12" in steering.scale({"preprocess": 7}, 1.0)
    steering.resize(Room(actors=7, cores=7), 2.0)
    assert steering.wanted == {"preprocess": 2, "write": 1}
