"""A training run: preprocess actors feed Ray Train workers, and failures resume from a checkpoint.

An attempt trains on a segment of the epochs (`epochs.py`): what the last checkpoint has not seen. A
dead worker, a lost node and a killed driver all end the same way: a segment is made from the last
checkpoint, and training goes on with the workers and actors that exist then. Ray Train's own
restarts are off: they would run the same dataset again.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import Dataset
from ray.exceptions import RayError
from rich.console import Console

from raypipe.data import lease, outputs
from raypipe.data.batches import check_read
from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.data.sinks import Sink
from raypipe.data.stores import StoreError
from raypipe.data.tables import REJECTS
from raypipe.errors import UsageError
from raypipe.images.recipe import for_evaluation
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Progress
from raypipe.run import execution as executions
from raypipe.run import probe as probes
from raypipe.run import result
from raypipe.run.causes import cause_of, causes
from raypipe.run.cluster.machine import beside_driver, cores_here
from raypipe.run.cluster.session import joins
from raypipe.run.console import say
from raypipe.run.execution import Claim, Execution, Setup, executing, new_run_id
from raypipe.run.job import preprocess_stage
from raypipe.run.meter import Meter
from raypipe.stages.preprocess import Preprocess
from raypipe.stages.stage import Stage
from raypipe.stages.write import Write
from raypipe.train.board import Board, ToBoard
from raypipe.train.epochs import Segment
from raypipe.train.following import Watch
from raypipe.train.plan import Assignment, Todo, plan
from raypipe.train.position import Position, from_states
from raypipe.train.result import (
    HeldOut,
    Outcome,
    is_complete,
    leave,
    report_of,
    report_without_figures,
)
from raypipe.train.settings import Settings
from raypipe.train.trainer import fit, trainer_of

_CLEARING = "clearing-checkpoints"
"""Marks that checkpoints are being deleted. Other jobs' results have a mark of their own."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A training that has something to do.

    storage: absolute.
    start: its progress, by the checkpoint `resume`.
    resume: None: the training is new.
    first: what is trained on first.
    clears: whether the content of the storage is deleted first.
    """

    settings: Settings
    todo: Todo
    run_id: str
    storage: str
    start: Progress
    resume: str | None
    first: Segment
    clears: bool
    console: Console

    @property
    def tell(self) -> Callable[[str], None]:
        """Prints a line for the user."""
        return partial(say, self.console)


def run(settings: Settings, *, console: Console | None = None) -> Outcome:
    """Train as `settings` say.

    Args:
        console: where messages go; by default the terminal (stderr).

    Raises:
        UsageError: the message is for the user.
        KeyboardInterrupt: checkpoints so far are kept; the same settings go on from them.
    """
    started = time.time()
    console = console or Console(stderr=True)
    with executions.untouched() as touch:
        this = _look(settings, console)
        total = this.todo.epochs.total
        if this.resume is not None and is_complete(this.start, settings):
            return _nothing_left(this, this.resume)
        if this.resume is not None:
            this.tell(
                f"Going on from {this.resume}: {this.start.rows} of {total} rows are done, "
                f"in {this.start.step} steps."
            )
        with executing(_setup(this, started), console=console, touch=touch) as execution:
            return _train(this, execution)


def _look(settings: Settings, console: Console) -> _Run:
    """List, plan, and find the last checkpoint. Changes nothing."""
    place = Location.of(settings.training.storage)
    storage = place.uri
    say(console, f"Listing {settings.source.input} ...")
    todo = plan(settings)
    result.check_report(settings.running.report)
    lease.check(place, option="--storage")
    if (place / f"{STATE}/run.json").exists():
        raise UsageError(
            f"--storage {settings.training.storage!r} has the results of another job "
            f"({STATE}/run.json); reports of both would be mixed. Give a folder of its own."
        )
    clears = not settings.running.resume or outputs.is_clearing(place, _CLEARING)
    start, resume = (Progress(), None) if clears else _latest(storage, todo)
    first = _segment(todo, resume, settings.training.workers)
    return _Run(
        settings=settings,
        todo=todo,
        run_id=new_run_id(settings.running.run_id),
        storage=storage,
        start=start,
        resume=resume,
        first=first,
        clears=clears,
        console=console,
    )


def _setup(this: _Run, started: float) -> Setup:
    settings, todo, workers = this.settings, this.todo, this.settings.training
    stage = _stage(this, this.run_id, this.first.work)
    auto = ("preprocess",) if stage.actors == "auto" else ()
    on_gpus = settings.device.must or (not settings.device.cpu and torch.cuda.is_available())
    cpus = 0 if on_gpus else workers.workers
    if auto and not joins():
        stage = replace(stage, actors=max(1, cores_here() - cpus))
    return Setup(
        run_id=this.run_id,
        what=(
            f"{settings.model.model} on {todo.epochs.rows} images, {todo.epochs.epochs} epochs, "
            f"{todo.holdout.num_rows} held out, {len(todo.training.classes)} classes, "
            f"recipe {todo.recipe.name}, {settings.decoding.backend}"
        ),
        given=settings.flat,
        started=started,
        images=todo.epochs.total - this.start.rows,
        stages=(stage,),
        threads=settings.running.threads,
        output=workers.storage,
        recipe=todo.recipe.name,
        shard_bytes=todo.shard_bytes,
        auto=auto,
        probe=_probe(this, stage),
        claim=Claim(
            root=Location.of(workers.storage), option="--storage", take=partial(_claimed, this)
        ),
        workers=executions.Workers(
            name="train", count=workers.workers, must=settings.device.must, cpus=cpus
        ),
        goes_on=this.resume is not None,
    )


def _stage(this: _Run, name: str, rows: pa.Table, *, holdout: bool = False) -> Stage:
    """The stage that makes pixels to learn from, or to judge on, for the attempt `name`."""
    settings, todo = this.settings, this.todo
    running, pixels = settings.running, todo.pixels
    if holdout:
        running = replace(running, read_ms=0.0)
        pixels = replace(pixels, recipe=for_evaluation(todo.recipe), decode_only=False)
    place = settings.holdout.holdout_input if holdout else None
    reading = running.reading(place or settings.source.input)
    return preprocess_stage(rows, pixels, running, reading, run_id=name)


def _probe(this: _Run, stage: Stage) -> probes.Probe:
    """Measures what it costs to store preprocessed images and to read them, for the break-even."""
    (first,) = stage.steps
    assert isinstance(first, Preprocess)
    return probes.Probe(
        rows=this.first.work,
        first=replace(first, pixels=replace(first.pixels, decode_only=False)),
        then=Write(
            sink=Sink(format="parquet", root=Location.of(this.storage)),
            backend=this.settings.decoding.backend,
        ),
        threads=this.settings.running.threads,
        stored=True,
    )


@contextmanager
def _claimed(this: _Run, *, check: Callable[[Location], None]) -> Iterator[lease.Lease]:
    """Hold the storage for this run alone, and clear it if asked for."""
    storage, place = this.storage, Location.of(this.storage)
    with lease.hold(place, run_id=this.run_id, option="--storage", tell=this.tell) as held:
        there = [] if this.clears else checkpoints.all_in(storage)
        if not this.clears and (there[-1] if there else None) != this.resume:
            raise UsageError(
                f"--storage {this.settings.training.storage!r} has changed since this run looked "
                f"at it: another training has written there. Nothing was changed. Start this one "
                f"again; it then goes on from what is there."
            )
        check(place / lease.file_of(place))
        if this.clears:
            this.tell(f"Deleting the checkpoints in {this.settings.training.storage} ...")
            with outputs.clearing(place, _CLEARING):
                for line in checkpoints.prune(storage):
                    this.tell(line)
                (place / f"{STATE}/report.json").delete()
        yield held


def _latest(storage: str, todo: Todo) -> tuple[Progress, str | None]:
    """Find the last checkpoint in `storage`, and its progress.

    Raises:
        UsageError: it is of a training with other settings.
    """
    found = checkpoints.all_in(storage)
    if not found:
        return Progress(), None
    checkpoints.check_same(found[-1], todo.deciding)
    return checkpoints.progress_of(found[-1]), found[-1]


def _nothing_left(this: _Run, folder: str) -> Outcome:
    """The outcome of a complete training. Makes the report again if it is missing."""
    storage, settings = this.storage, this.settings
    epochs = settings.learning.epochs
    report = None
    if result.is_report(Location.of(storage) / STATE):
        this.tell(
            f"Nothing to do: all {epochs} epochs are done; the model is in {folder}. "
            f"--no-resume trains again."
        )
    else:
        this.tell(
            f"All {epochs} epochs are done, but the run that did the last one was cut off. "
            f"Writing its report ..."
        )
        place = Location.of(storage)
        with lease.hold(place, run_id=this.run_id, option="--storage", tell=this.tell):
            _keep_latest(this)
            report = report_without_figures(settings, this.todo, this.start, run_id=this.run_id)
            leave(settings, report, this.start)
    return Outcome(
        report=report, progress=this.start, rows=this.todo.epochs.total, checkpoint=folder
    )


def _keep_latest(this: _Run) -> None:
    keep = checkpoints.all_in(this.storage)[-this.settings.training.keep :]
    checkpoints.prune(this.storage, keep=keep)


def _train(this: _Run, execution: Execution) -> Outcome:
    """Train to the end, in as many attempts as it takes."""
    total = this.todo.epochs.total
    board = ray.remote(Board).options(**beside_driver()).remote()
    held = _held_out(this, execution)
    watch = Watch(
        this.console,
        total,
        execution.collector,
        begun_at=execution.begun_at,
        before=(this.start.rows, this.start.rejected),
        rows=this.start.rows,
    )
    progress, folder, segment = this.start, this.resume, this.first
    failures = attempt = 0
    said: str | None = None
    while True:
        attempt += 1
        name = f"{this.run_id}-{attempt}"
        try:
            with watch.on(board), executions.tracks(name):
                assignment = _assignment(
                    this, execution, held, segment, name=name, resume=folder, board=board
                )
                trainer = trainer_of(
                    assignment,
                    _blocks(this, execution, segment, name),
                    name=name,
                    storage=Location.of(this.storage),
                    workers=this.settings.training,
                    on_gpu=execution.workers_on_gpu,
                )
                fit(trainer, execution.check)
            progress, folder = _latest(this.storage, this.todo)
            failures = 0
            if segment.epochs.stop == this.todo.epochs.epochs:
                break
        except ray.train.TrainingFailedError as error:
            execution.check()
            now, latest = _latest(this.storage, this.todo)
            failures = 1 if now.rows > progress.rows else failures + 1
            retries = this.settings.training.retries
            _give_up(error, failures, retries, before=said if failures > 1 else None)
            said = cause_of(error)
            progress, folder = now, latest
            this.tell(
                f"A worker ended ({said}). Going on from {folder or 'the start'}: {progress.rows} "
                f"of {total} rows are done; retry {failures} of {retries}."
            )
        segment = _segment(this.todo, folder, this.settings.training.workers)
    measured = execution.measured()
    assert folder is not None
    _keep_latest(this)
    report = report_of(this.settings, this.todo, execution, measured, progress, watch, held)
    leave(this.settings, report, progress)
    return Outcome(report=report, progress=progress, rows=total, checkpoint=folder)


def _held_out(this: _Run, execution: Execution) -> HeldOut:
    """Make the blocks to judge on, once: without randomness, all epochs have the same."""
    rows = this.todo.holdout
    if not rows.num_rows:
        return HeldOut()
    stage = _stage(this, this.run_id, rows, holdout=True)
    # These actors start for this alone. A start takes a second of CPU, as long as 300 images.
    count = min(execution.counts[stage.name], 1 + rows.num_rows // 300)
    made = execution.dataset(
        rows, (stage,), counts={stage.name: count}, observed=False
    ).materialize()
    rejected, dropped = 0, list[dict[str, Any]]()
    columns = [*REJECTS.names, "boxes_dropped"]
    for block in made.select_columns(columns).iter_batches(batch_format="pyarrow"):
        for row in block.to_pylist():
            boxes = row.pop("boxes_dropped") or ()
            dropped += [{"image_id": row["image_id"], "uri": row["uri"], **box} for box in boxes]
            if row["reason"] is not None:
                check_read(row)
                rejected += 1
    # Put again by the driver: a lost node would take blocks away whose actors have ended.
    blocks = [ray.put(ray.get(ref)) for ref in made.to_arrow_refs()]
    return HeldOut(blocks=blocks, rejected=rejected, dropped=dropped)


def _assignment(
    this: _Run,
    execution: Execution,
    held: HeldOut,
    segment: Segment,
    *,
    name: str,
    resume: str | None,
    board: ray.actor.ActorHandle,
) -> Assignment:
    """What the workers of the attempt `name` start with. It goes on from `resume`."""
    todo, log = this.todo, this.settings.training.row_log
    return Assignment(
        training=todo.training,
        settings=todo.deciding,
        attempt=str(Location.of(this.storage) / name),
        resume=resume,
        segment=segment.without_rows(),
        holdout=held.blocks,
        dropped=held.dropped,
        board=ToBoard(board),
        meter=Meter(stage="train", collector=execution.collector, loops=True),
        row_log=log and os.path.abspath(log),
    )


def _blocks(this: _Run, execution: Execution, segment: Segment, name: str) -> Dataset | None:
    """The blocks that the attempt `name` trains on; None: no row is left."""
    if not segment.left:
        return None
    return execution.dataset(segment.work, (_stage(this, name, segment.work),))


def _segment(todo: Todo, resume: str | None, workers: int) -> Segment:
    """What to train on next: the rows that the checkpoint `resume` has not seen."""
    position = Position()
    if resume is not None:
        position = from_states(checkpoints.seen_by(resume), todo.training.decides)
    return todo.epochs.next(position, ranks=workers)


def _give_up(
    error: ray.train.TrainingFailedError, failures: int, retries: int, *, before: str | None
) -> None:
    """Raise the error if trying again is of no use.

    That is a cause that the user must remove, too many failures, or an exception of code twice.

    Args:
        before: the cause of the failure before this one, at the same checkpoint.
    """
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, UsageError | StoreError):
            raise cause
    died = any(isinstance(cause, RayError) for cause in chain)
    if failures > retries or (not died and cause_of(error) == before):
        raise error
