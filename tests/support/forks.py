"""Processes of tests that need what a test module imports."""

import multiprocessing
from multiprocessing.context import ForkServerContext


def forks(module: str) -> ForkServerContext:
    """Starts processes as forks of one that has imported `module`.

    A spawned process imports for 2 to 9 s of CPU. Forks of the test's own process would have the
    locks of its threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
