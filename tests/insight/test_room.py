"""Counts that fit into a room that shrinks and grows, and what a run says of it."""

import pytest

from raypipe.insight.remarks import Short, notices
from raypipe.insight.room import Node, Room, actors_on, fitted, staying
from raypipe.insight.states import PoolView


@pytest.mark.parametrize(
    ("asked", "room", "counts"),
    [
        ({"preprocess": 6, "write": 2}, 8, {"preprocess": 6, "write": 2}),
        ({"preprocess": 6, "write": 2}, 4, {"preprocess": 3, "write": 1}),
        ({"preprocess": 6, "write": 2}, 2, {"preprocess": 1, "write": 1}),
        # A stage without an actor would hold up all others.
        ({"preprocess": 6, "write": 2}, 0, {"preprocess": 1, "write": 1}),
        ({"a": 5, "b": 5, "c": 5}, 7, {"a": 3, "b": 2, "c": 2}),
        ({"preprocess": 40}, 3, {"preprocess": 3}),
    ],
)
def test_counts_shrink_in_proportion_and_every_stage_keeps_an_actor(asked, room, counts):
    assert fitted(asked, Room(actors=room, cores=room)) == counts


def test_workers_keep_their_cpus_and_stages_on_gpus_take_none():
    asked = {"train": 2, "preprocess": 6, "predict": 3}
    room = Room(actors=5, cores=5, gpus=1)
    fits = fitted(asked, room, on_gpu={"predict"}, fixed={"train"})
    assert fits == {"train": 2, "preprocess": 3, "predict": 1}


def test_a_node_that_will_go_has_no_room_and_memory_bounds_what_was_not_asked_for():
    nodes = [
        Node(id="a", name="10.0.0.1", cpus=4, memory=2 * 10**9),
        Node(id="b", name="10.0.0.2", cpus=4, leaving=True),
    ]
    assert actors_on(staying(nodes), holds=10**9, asked=1) == 2
    assert actors_on(staying(nodes), holds=10**9, asked=3) == 3
    assert actors_on(nodes, holds=1, asked=1) == 8


BUSY = {"preprocess": PoolView(running=2, queued=3), "write": PoolView(running=1, queued=1)}


@pytest.mark.parametrize(
    ("pools", "at_work", "said"),
    [
        ({}, {}, "no actor has started yet"),
        (
            BUSY | {"write": PoolView(pending=2, queued=4)},
            {},
            "no write actor runs, and 2 wait for a CPU or start; 0 CPUs of the cluster are free",
        ),
        (BUSY, {"preprocess": 2}, "2 preprocess actors are still at the shards that they had then"),
        (BUSY, {}, "what they made is not taken on"),
        (
            {name: PoolView(running=1) for name in BUSY},
            {},
            "the actors are idle, and who takes the blocks takes none",
        ),
    ],
)
def test_a_run_in_which_nothing_moves_says_why(pools, at_work, said):
    ((_, text),) = notices(pools, at_work=at_work, idle_s=40, short=None, free_cpus=0.0)
    assert text.startswith("Nothing has moved for 40 s: ") and said in text
    assert notices(pools, at_work=at_work, idle_s=20, short=None, free_cpus=None) == []


def test_what_is_missing_is_said_with_what_is_done_about_it():
    short = Short(asked=24, there=12, for_s=40, grows=True)
    ((kind, text),) = notices(BUSY, at_work={}, idle_s=0, short=short, free_cpus=None)
    assert text == (
        "Waiting for 12 of 24 CPUs, 40 s: the autoscaler is asked for them. The run goes on with "
        "12, and uses nodes as they come."
    )
    later = Short(asked=24, there=12, for_s=60, grows=True)
    assert notices(BUSY, at_work={}, idle_s=0, short=later, free_cpus=None)[0][0] == kind
