"""How executions begin."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext

START_AT_MOST_S = 600
"""Actors that are not there by then never will be."""


@contextmanager
def together() -> Iterator[None]:
    """Make executions wait until all their actors are ready: none works while others start."""
    context = DataContext.get_current()
    before = context.wait_for_min_actors_s
    context.wait_for_min_actors_s = START_AT_MOST_S
    try:
        yield
    finally:
        context.wait_for_min_actors_s = before
