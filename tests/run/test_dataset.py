"""How executions begin."""

import ray

from raypipe.run.dataset import START_AT_MOST_S, together


def test_executions_are_told_to_wait_for_all_their_actors_and_others_are_not():
    context = ray.data.DataContext.get_current()
    before = context.wait_for_min_actors_s
    with together():
        assert context.wait_for_min_actors_s == START_AT_MOST_S
    assert context.wait_for_min_actors_s == before
