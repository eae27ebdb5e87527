"""Prints what a run waits for, and why nothing moves. A thread of the driver asks the collector."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

ASK_EVERY_S = 5.0
SAY_EVERY_S = 60.0
"""The same is said again after this."""


@contextmanager
def following(collector: ray.actor.ActorHandle, tell: Callable[[str], None]) -> Iterator[None]:
    """Follow a run until the end of the block.

    Args:
        tell: prints a line.
    """
    ended = threading.Event()

    def follow() -> None:
        said: list[str] = []
        waited_s = 0.0
        while not ended.wait(ASK_EVERY_S):
            try:
                notices = ray.get(collector.notices.remote(), timeout=ASK_EVERY_S)
            except (RayError, TimeoutError):  # it is busy, or was killed: the run goes on
                continue
            waited_s += ASK_EVERY_S
            kinds = [kind for kind, _ in notices]
            if ended.is_set() or (kinds == said and waited_s < SAY_EVERY_S):
                continue
            for kind, line in notices:
                if kind not in said or waited_s >= SAY_EVERY_S:
                    tell(line)
            if said and not kinds:
                tell("The run waits for nothing any more.")
            said, waited_s = kinds, 0.0

    thread = threading.Thread(target=follow, daemon=True, name="raypipe-watchdog")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * ASK_EVERY_S)
