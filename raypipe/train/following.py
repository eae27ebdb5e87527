"""Follows a training from the driver: prints its progress, and keeps what the report needs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from rich.console import Console

from raypipe.run.console import say
from raypipe.run.progress import LINE_EVERY_S


@dataclass
class Watch:
    """Follows the board while an attempt runs: prints progress, and keeps what the report needs.

    before: rows and rejects of earlier runs.
    rows: done by now.
    outputs: seconds since the begin, and rows done since the output before.
    workers: for each attempt, the latest figures of its workers.
    began: time.time() of the first step.
    """

    console: Console
    total: int
    collector: ray.actor.ActorHandle
    begun_at: float
    before: tuple[int, int]
    rows: int
    outputs: list[tuple[float, int]] = field(default_factory=list)
    workers: list[list[dict[str, Any]]] = field(default_factory=list)
    began: float | None = None
    _seen: int = 0
    _said: float = 0.0

    @contextmanager
    def on(self, board: ray.actor.ActorHandle) -> Iterator[None]:
        """Follow `board` while an attempt runs inside."""
        self.workers.append([])
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(0.3):
                self._look(board)

        thread = threading.Thread(target=follow, daemon=True, name="raypipe-watch")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._look(board)

    def _look(self, board: ray.actor.ActorHandle) -> None:
        try:
            records = ray.get(board.since.remote(self._seen))
        except RayError:  # the board died: its figures are lost, and the training goes on
            return
        for record in records:
            self._seen += 1
            self.began = self.began or record["began"]
            if record["rows"] > self.rows:
                self.outputs.append((record["at"] - self.begun_at, record["rows"] - self.rows))
                self.rows = record["rows"]
                self.collector.progress.remote(
                    record["at"], self.rows - self.before[0], record["rejected"] - self.before[1]
                )
            if record["kind"] == "epoch":
                self.workers[-1] = record["workers"]
                say(self.console, _epoch_line(record))
            elif time.perf_counter() - self._said >= LINE_EVERY_S:
                self._said = time.perf_counter()
                say(self.console, _step_line(record, self.total))


def _epoch_line(record: dict[str, Any]) -> str:
    judged = (
        "" if record["map"] is None else f", mAP {record['map']:.3f} (at .50 {record['map50']:.3f})"
    )
    loss = "no image" if record["loss"] is None else f"loss {record['loss']:.3f}"
    return (
        f"epoch {record['epoch']} done: {loss}{judged}, {record['images']} images in "
        f"{record['seconds']:.1f} s, {record['images_per_s']:.1f} images/s, "
        f"{100 * record['wait_share']:.0f}% waiting for data"
    )


def _step_line(record: dict[str, Any], total: int) -> str:
    loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
    return (
        f"{record['rows']}/{total} rows, epoch {record['epoch']}, step {record['step']}, "
        f"loss {loss}, lr {record['lr']:.2g}, {record['images_per_s']:.1f} images/s, "
        f"{100 * record['wait_share']:.0f}% waiting for data, {record['rejected']} rejected"
    )
