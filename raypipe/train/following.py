"""Follows a training from the driver: tells the user how it goes, and keeps what the report needs."""

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
    """Follows the board while an attempt runs: tells the user, and keeps what the report needs."""

    console: Console
    total: int
    collector: ray.actor.ActorHandle
    begun_at: float
    before: tuple[int, int]  # rows and rejects of earlier runs
    rows: int  # done by now
    outputs: list[tuple[float, int]] = field(default_factory=list)
    workers: list[list[dict[str, Any]]] = field(
        default_factory=list
    )  # of each attempt, what its workers last said
    began: float | None = None  # when the first step did, time.time()
    _seen: int = 0
    _said: float = 0.0

    @contextmanager
    def on(self, board: ray.actor.ActorHandle) -> Iterator[None]:
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
        f"epoch {record['epoch']} done: {loss}{judged}, {record['images']} images in {record['seconds']:.1f} s, "
        f"{record['images_per_s']:.1f} images/s, {100 * record['wait_share']:.0f}% waiting for data"
    )


def _step_line(record: dict[str, Any], total: int) -> str:
    loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
    return (
        f"{record['rows']}/{total} rows, epoch {record['epoch']}, step {record['step']}, loss {loss}, lr {record['lr']:.2g}, "
        f"{record['images_per_s']:.1f} images/s, {100 * record['wait_share']:.0f}% waiting for data, {record['rejected']} rejected"
    )
