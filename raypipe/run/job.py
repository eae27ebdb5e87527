"""A job on Ray Data, from its rows to its report. preprocess and predict are jobs.

`carry_out` claims the output, runs the stages, and accounts for every row.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from raypipe.data import journal, outputs
from raypipe.data.location import Location
from raypipe.data.reader import Reading
from raypipe.data.work import SHORT, requeued
from raypipe.errors import UsageError
from raypipe.images.header import NO_ROOM
from raypipe.images.recipe import Recipe
from raypipe.insight import report as reports
from raypipe.run import probe as probes
from raypipe.run.cluster.machine import versions
from raypipe.run.cluster.session import ends_soon, output_is_there
from raypipe.run.console import say
from raypipe.run.execution import (
    Claim,
    Execution,
    Setup,
    executing,
    new_run_id,
    tracks_folder,
    untouched,
)
from raypipe.run.live.control import Control
from raypipe.run.progress import Tally, progress
from raypipe.run.result import (
    Became,
    Outcome,
    became,
    covers,
    leave_report,
    of_all_parts,
    ranges,
    shown,
)
from raypipe.run.settings import Executing, Running
from raypipe.run.todo import Todo, among
from raypipe.stages.planning import Preprocessing
from raypipe.stages.preprocess import Preprocess
from raypipe.stages.stage import Stage, auto_of, forms


def shard_pixels(work: pa.Table, recipe: Recipe) -> int:
    """Bytes of the pixels of the largest shard of `work` (schema WORK); 0: sizes differ."""
    height, width = recipe.fixed_size or (0, 0)
    return _largest(work) * height * width * 3


def _largest(work: pa.Table) -> int:
    return int(pc.max(work.column("shard").value_counts().field("counts")).as_py() or 0)


def preprocess_stage(
    work: pa.Table, pixels: Preprocessing, running: Executing, reading: Reading, *, run_id: str
) -> Stage:
    """Make the stage that turns shards of `work` (schema WORK) into blocks of pixels."""
    return Stage(
        steps=(
            Preprocess(
                pixels=pixels,
                tracks=tracks_folder(run_id),
                reading=reading,
                wait_ms=running.read_ms,
                bytes_out=shard_pixels(work, pixels.done_here),
            ),
        ),
        actors=running.actors,
        noun="preprocess actors",
        option="actors",
        doing="preprocessing",
        # With 12 images a shard and two blocks in flight, 1 and 2 actors did 174 and 244 images/s;
        # with four blocks 208 and 337.
        in_flight=4 if _largest(work) < SHORT else 2,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run does: images are preprocessed, then go through the stage `then`, if there is one.
    Where that `joins` the first, the preprocess actors may do its steps.

    given: all settings by their flat names, for the report.
    conclude: called when all shards are done, with all images that were delivered. Its result is
        added to the report, except "dropped": unusable boxes (journal.Dropped).
    """

    given: dict[str, Any]
    running: Running
    reading: Reading
    pixels: Preprocessing
    todo: Todo
    then: Stage | None
    conclude: Callable[[list[journal.Written]], dict[str, Any]] = lambda written: {}

    @property
    def root(self) -> Location | None:
        """The output."""
        return self.todo.claim.root if self.todo.claim is not None else None

    def stages(self, run_id: str) -> tuple[Stage, ...]:
        """The pipeline; where the planner may fuse its stages, with both of them (`forms`)."""
        first = preprocess_stage(
            self.todo.left, self.pixels, self.running, self.reading, run_id=run_id
        )
        return (first,) if self.then is None else forms((first, self.then))[-1]

    def setup(self, run_id: str, *, started: float, tell: Callable[[str], None]) -> Setup:
        """Describe the job to an execution. `tell`: prints a line for the user."""
        stages = self.stages(run_id)
        auto = auto_of(stages)
        recipe, left, claim = self.todo.recipe.name, self.todo.left, self.todo.claim
        taken = None
        if claim is not None:
            take = partial(outputs.claimed, claim, run_id=run_id, tell=tell)
            taken = Claim(root=claim.root, option=claim.option, take=take)
        return Setup(
            run_id=run_id,
            what=f"{left.num_rows} images, recipe {recipe}, {self.pixels.backend}",
            given=self.given,
            started=started,
            images=left.num_rows,
            stages=stages,
            threads=self.running.threads,
            output=None if self.root is None else str(self.root),
            recipe=recipe,
            shard_bytes=self.todo.shard_bytes,
            auto=auto,
            probe=probes.of(left, stages, threads=self.running.threads) if auto else None,
            claim=taken,
            goes_on=claim is not None and not claim.clears and claim.seen.run_json is not None,
        )


def carry_out(
    make: Callable[[], Job],
    *,
    source: str,
    consume: Callable[[pa.Table], None] | None = None,
    console: Console | None = None,
    began: Callable[[Control], None] = lambda control: None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Do the job that `make` returns.

    Args:
        source: the input that `make` lists, for messages.
        consume: called with each block of pixels (schema BLOCK), if nothing is written.
        console: where messages go; by default the terminal (stderr).
        began: called when the execution begins, with the control of the run.
        stop: when it is set, the run ends as by Ctrl-C.

    Raises:
        UsageError: the message is for the user; nothing was started.
        KeyboardInterrupt: results so far are kept; the same settings go on from them.
    """
    started = time.time()
    console = console or Console(stderr=True)
    with untouched() as touch:
        say(console, f"Listing {source} ...")
        job = make()
        run_id = new_run_id(job.running.run_id)
        todo = job.todo
        if not todo.left.num_rows:
            return _nothing_left(job, run_id, source=source, console=console, touch=touch)
        if done := todo.work.num_rows - todo.left.num_rows:
            say(console, f"Going on: {done} of {todo.work.num_rows} images are done already.")
        setup = job.setup(run_id, started=started, tell=partial(say, console))
        with executing(setup, console=console, touch=touch) as execution:
            began(Control(run_id, execution.collector))
            tally = Tally()
            with progress(console, todo.left.num_rows) as show:
                doing: Job | None = job
                while doing is not None:
                    job = doing
                    _iterate(job, execution, tally, consume=consume, stop=stop, show=show)
                    doing = _in_smaller_shards(job, tally, console)
            # Before Ray ends, which takes seconds. A driver that is killed then has its report.
            return _account(job, execution, tally, before=done)


def _iterate(
    job: Job,
    execution: Execution,
    tally: Tally,
    *,
    consume: Callable[[pa.Table], None] | None,
    stop: threading.Event | None,
    show: Callable[[Tally], None],
) -> None:
    """Consume the output of the last stage to its end."""
    blocks = execution.dataset(job.todo.left).iter_batches(
        batch_size=None,
        batch_format="pyarrow",
        # Prefetching is for blocks of other nodes. Here it would delay each block by one.
        prefetch_batches=1 if execution.session.nodes > 1 and job.then is None else 0,
    )
    for block in blocks:
        tally.count(block, time.perf_counter() - execution.begun)
        output_is_there()
        tally.tell(execution.collector)
        show(tally)
        if consume is not None and job.then is None:
            tally.consume(consume, _without(block, NO_ROOM))
        if stop is not None and stop.is_set():
            ends_soon()
            raise KeyboardInterrupt
        execution.check()
    tally.tell(execution.collector, last=True)


def _without(block: pa.Table, detail: str) -> pa.Table:
    """`block` (schema BLOCK) without the rows that have this detail."""
    has = pc.fill_null(pc.equal(block.column("detail"), detail), False)
    return block.filter(pc.invert(has)) if pc.any(has).as_py() else block


def _in_smaller_shards(job: Job, tally: Tally, console: Console) -> Job | None:
    """The job with those rows left that had no room beside the rest of their shard; None: no rows.

    These rows get smaller shards. A row that is alone in its shard is delivered or rejected, so
    this ends.
    """
    todo, root = job.todo, job.root
    if not tally.unread:
        return None
    unread = tally.became.unread
    if root is not None:
        found = journal.unread(root, todo.left.column("shard").to_pylist())
        unread = [row for rows in found.values() for row in rows]
    ids = pa.array([row.image_id for row in unread if row.detail == NO_ROOM], pa.string())
    back = todo.left.filter(pc.is_in(todo.left.column("image_id"), ids))
    if not back.num_rows:
        return None
    waiting: dict[int, set[str]] = {}
    pairs = (back.column(name).to_pylist() for name in ("shard", "image_id"))
    for shard, image_id in zip(*pairs, strict=True):
        waiting.setdefault(shard, set()).add(image_id)
    stored = todo.work if root is None else journal.read_work(root)
    assert stored is not None
    every = 1 if todo.part is None else todo.part.of
    stored = requeued(stored, waiting, tight=waiting.keys(), every=every, **todo.cut)
    if root is not None:
        journal.put_work(root, stored)
    tally.take_back(back.num_rows)
    say(
        console,
        f"{back.num_rows} images had no room in --actor-memory beside the rest of their shards: "
        "they follow in smaller shards.",
    )
    work = stored.filter(among(stored, todo.work))
    left = work.filter(among(work, back))
    return replace(job, todo=replace(todo, work=work, left=left))


def _nothing_left(
    job: Job, run_id: str, *, source: str, console: Console, touch: Callable[[], None]
) -> Outcome:
    """The outcome of a run that finds all shards done. Makes missing reports again."""
    todo = job.todo
    assert todo.claim is not None
    root, total = todo.claim.root, todo.work.num_rows
    rows = became(root, todo.work)
    if lost := total - len(rows.written) - len(rows.rejected) - len(rows.unread):
        raise UsageError(
            f"The journal in {root} says that all shards are done, but its entries have {lost} of "
            f"{total} images neither as written nor as rejected: somebody changed it, or it is a "
            f"defect of raypipe. --no-resume does all of them again."
        )
    covered = covers(root, todo.work)
    if covered:
        say(
            console,
            f"Nothing to do: all {total} images of {source} are done, in {root}. --no-resume does "
            f"them again.",
        )
    else:
        say(
            console,
            f"All {total} images of {source} are done, in {root}, but the run that did the last of "
            f"them was cut off. Writing its report from the journal ...",
        )
    nothing = Outcome(report=None, rejected=rows.rejected, unread=rows.unread, rows=total)
    delivered: list[journal.Written] | None = rows.written
    if covered and todo.part is not None:
        delivered = of_all_parts(root, todo.part)
    if covered and (delivered is None or all((root / file).exists() for file in todo.endings)):
        return nothing
    tell = partial(say, console)
    with outputs.claimed(todo.claim, run_id=run_id, tell=tell, check=lambda file: touch()):
        if covered and delivered is not None:
            job.conclude(delivered)
            return nothing
        counts = rows.counts(rows=total, before=total, skipped=todo.skipped)
        report = reports.unmeasured(
            run_id=run_id, settings=job.given, versions=versions(), counts=counts
        )
        return _conclude(job, report, rows)


def _account(job: Job, execution: Execution, tally: Tally, *, before: int) -> Outcome:
    """Account for the rows and the costs of an execution, and write the report.

    Args:
        before: rows that were done before it.
    """
    measured = execution.measured()
    todo = job.todo
    rows = tally.became if job.root is None else became(job.root, todo.work)
    counts = rows.counts(
        rows=todo.work.num_rows,
        before=before,
        out=tally.images - tally.rejected - tally.unread if job.root is None else None,
        damaged=tally.damaged,
        skipped=todo.skipped,
    )
    report = execution.report(
        measured,
        counts,
        outputs=tally.outputs,
        ready_s=execution.ready_s(measured.snapshot),
        consumer=tally.consumed,
    )
    return _conclude(job, report, rows)


def _conclude(job: Job, report: dict[str, Any], rows: Became) -> Outcome:
    """Write what a run leaves at its end. The report is last: it says which shards are covered."""
    work, root, place = job.todo.work, job.root, job.running.report
    dropped = rows.dropped
    pictures = shown(work, rows.rejected) if root is not None or place is not None else []
    if root is not None:
        # What all images make together is made by the part that ends last.
        extra = job.conclude(rows.written) if job.todo.part is None else {}
        dropped = extra.pop("dropped", dropped)
        report |= {**extra, "boxes_dropped": len(dropped)}
        report["shards"] = ranges(work.column("shard").to_pylist())
        outputs.clear_temporary(root)  # unfinished files of killed actors
        leave_report(root, f"{root.state}/", report, rows.rejected, pictures, dropped)
        if job.todo.part is not None and (all_ := of_all_parts(root, job.todo.part)) is not None:
            report |= job.conclude(all_)
            leave_report(root, f"{root.state}/", report, rows.rejected, pictures, dropped)
    if place is not None:
        leave_report(Location.of(place), "", report, rows.rejected, pictures, dropped)
    return Outcome(report=report, rejected=rows.rejected, unread=rows.unread, rows=work.num_rows)
