"""Counts what came out of an execution so far, and shows it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from raypipe.data.tables import REJECTS
from raypipe.images.header import NO_ROOM
from raypipe.insight.states import Consumed
from raypipe.run.result import Became
from raypipe.stages.write import dropped_of, rejected_of, unread_of

LINE_EVERY_S = 5.0


@dataclass
class Tally:
    """What came out of the execution so far.

    outputs: seconds since the begin, and rows done.
    damaged: damaged images that were delivered.
    became: rows of blocks of pixels. Writers put theirs into the journal.
    consumed: the time of the caller's function.
    """

    outputs: list[tuple[float, int]] = field(default_factory=list)
    images: int = 0
    rejected: int = 0
    unread: int = 0
    damaged: int = 0
    became: Became = field(default_factory=Became)
    consumed: Consumed | None = None
    _free_at: float | None = None
    _sent_at: float = 0.0

    @property
    def rate(self) -> str:
        """Images/s since the first shard came out, as text. Start-up does not count."""
        took = self.outputs[-1][0] - self.outputs[0][0] if self.outputs else 0.0
        return f"{(self.images - self.outputs[0][1]) / took:.0f}" if took else "-"

    def count(self, block: pa.Table, at_s: float) -> None:
        """Count a block of the last stage: pixels (schema BLOCK) or counts (schema DONE)."""
        if "image" in block.column_names:
            images, rejected, unread = self._count_pixels(block)
        else:
            images, rejected, unread = (
                pc.sum(block.column(name)).as_py() for name in ("images", "rejected", "unread")
            )
        self.unread += unread
        self.images += images
        self.rejected += rejected
        self.outputs.append((at_s, images))

    def take_back(self, rows: int) -> None:
        """Uncount `rows` unread rows, which had no room beside the rest of their shards."""
        self.images -= rows
        self.unread -= rows
        self.outputs = [(at_s, min(images, self.images)) for at_s, images in self.outputs]
        self.became.unread[:] = [row for row in self.became.unread if row.detail != NO_ROOM]

    def _count_pixels(self, block: pa.Table) -> tuple[int, int, int]:
        bad = block.filter(pc.is_valid(block.column("reason")))
        rows = bad.select(REJECTS.names).to_pylist()
        boxes = block.select(("image_id", "uri", "boxes_dropped")).to_pylist()
        self.became.dropped.extend(dropped_of(boxes))
        self.became.boxes_from.update(block.column("boxes_from").drop_null().to_pylist())
        rejects, waiting = rejected_of(rows), unread_of(rows)
        self.became.rejected.extend(rejects)
        self.became.unread.extend(waiting)
        detailed = block.num_rows - block.column("detail").null_count
        self.damaged += detailed - len(rejects) - len(waiting)
        return block.num_rows, len(rejects), len(waiting)

    def tell(self, collector: ray.actor.ActorHandle, *, last: bool = False) -> None:
        """Send the counts to those who watch, at most twice a second, and the `last` ones."""
        now = time.time()
        if last or now - self._sent_at >= 0.5:
            collector.progress.remote(now, self.images, self.rejected, self.consumed)
            self._sent_at = now

    def consume(self, consume: Callable[[pa.Table], None], block: pa.Table) -> None:
        """Pass a block to the caller's function, and time it.

        The wait for the first block is start-up and does not count.
        """
        begun, cpu_s = time.perf_counter(), time.process_time()
        waiting_s = 0.0 if self._free_at is None else begun - self._free_at
        try:
            consume(block)
        finally:
            self._free_at = time.perf_counter()
            before = self.consumed or Consumed(images=0, busy_s=0.0, waiting_s=0.0)
            self.consumed = Consumed(
                images=before.images + block.num_rows,
                busy_s=before.busy_s + self._free_at - begun,
                waiting_s=before.waiting_s + waiting_s,
                cpu_s=before.cpu_s + time.process_time() - cpu_s,
            )


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[Tally], None]]:
    """Show a progress bar in a terminal; elsewhere (a log, `ray job submit`) a line at times."""
    begun = said = time.perf_counter()
    if not console.is_terminal:

        def line(tally: Tally) -> None:
            nonlocal said
            now = time.perf_counter()
            if now - said >= LINE_EVERY_S or tally.images == total:
                said = now
                console.print(
                    f"{tally.images}/{total} images, {tally.rejected} rejected, "
                    f"{tally.rate} images/s, {now - begun:.0f} s",
                    highlight=False,
                )

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s, {task.fields[rejected]} rejected"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("starting actors", total=total, rate="-", rejected=0)

        def bar(tally: Tally) -> None:
            bars.update(
                task,
                description="images",
                completed=tally.images,
                rate=tally.rate,
                rejected=tally.rejected,
            )

        yield bar
