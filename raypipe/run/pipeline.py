"""A run: stages put on Ray Data and watched to their end. The only place that builds datasets."""

import os
import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from raypipe import UsageError
from raypipe.data import journal, location, sizes
from raypipe.data.formats.coco import check_annotation_ids
from raypipe.data.listing import look
from raypipe.data.reader import Reading
from raypipe.data.shapes import Placement, placement
from raypipe.data.sinks import Sink, annotations_of, write_annotations
from raypipe.data.tables import frames_of
from raypipe.data.work import (
    extend,
    make_work,
    named_as_before,
    remaining,
    renewed,
    requeued,
    shards,
    unlist,
    wanted_by,
)
from raypipe.images import backend as backend_module
from raypipe.images import catalog
from raypipe.images.decode import Reject
from raypipe.images.frames import into_picture
from raypipe.images.recipe import Recipe
from raypipe.insight import planner
from raypipe.insight import report as reports
from raypipe.run import probe as probes
from raypipe.run.causes import Untouched
from raypipe.run.collector import Facts, collecting
from raypipe.run.command import say
from raypipe.run.control import Control
from raypipe.run.meter import Meter, busy_cpu_s
from raypipe.run.registry import registered
from raypipe.run.result import (
    Became,
    Outcome,
    became,
    check_report,
    covers,
    leave_report,
    ranges,
    shown,
)
from raypipe.run.scaling import steer
from raypipe.run.session import (
    Pools,
    Session,
    check_shared,
    hardware,
    ray_session,
    seated,
    size_pools,
    versions,
)
from raypipe.run.settings import (
    Settings,
    check_apart,
    check_cache_names,
    check_free,
    deciding,
    image_folder,
    reading,
    result_names,
    stored_as,
)
from raypipe.stages import After
from raypipe.stages.actor import TRIES
from raypipe.stages.preprocess import Preprocess, Preprocessing
from raypipe.stages.write import Write, dropped_of, rejected_of, unread_of

T = TypeVar("T")


SHORT = 32
"""Images of a shard below which an actor holds four instead of two: Ray Data hands out tasks ten times a second, and the fastest recipes take 3 ms an
image, so two would leave it without work in between (12 images a shard: 174 to 244 images/s with two, 208 to 337 with four, 1 and 2 actors)."""


def preprocessed(
    work: pa.Table,
    settings: Preprocessing,
    *,
    pools: Pools,
    cpus_each: float = 1.0,
    threads: int = 1,
    reading: Reading | None = None,
    read_ms: float = 0.0,
    store_ms: float = 0.0,
    after: After | None = None,
    run_id: str,
    collector: ray.actor.ActorHandle | None = None,
) -> ray.data.Dataset:
    """The run as a dataset: blocks of pixels (schema BLOCK), or with a stage `after` what that says of each shard (schema DONE).

    Nothing runs before it is consumed. One shard is one block is one call, all the way; rows of `work` are small.
    """
    tables = list(shards(work))
    # from_arrow would run a task for each table first, and Ray start as many processes for them as the cluster has CPUs.
    dataset = ray.data.from_blocks(tables)
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A shard stays one block, however large.
    context.target_max_block_size = 2**62
    # The actors measure their own memory; Ray Data would start a thread for it in every task.
    context.memory_usage_poll_interval_s = None
    largest = max(table.num_rows for table in tables)
    height, width = settings.done_here.fixed_size or (0, 0)
    if collector is not None:
        actors = {"preprocess": Preprocess} | ({after.name: after.actor} if after else {})
        steer(
            context,
            collector=collector,
            stages={f"MapBatches({actor.__name__})": name for name, actor in actors.items()},
        )
    # Ray would repeat the task of an actor that dies for ever. Each image of a shard may kill it TRIES times, then it is left out.
    # Ray 2.60 deprecates passing these through, before it has another way (docs of map_batches, "ray_remote_args").
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*", category=RayDeprecationWarning)
    again = {"max_restarts": -1, "max_task_retries": TRIES * largest}
    dataset = dataset.map_batches(
        Preprocess,
        fn_constructor_kwargs={
            "settings": settings,
            "threads": threads,
            "tracks": tracks_folder(run_id),
            "reading": reading,
            "wait_ms": read_ms,
            "bytes_out": largest * height * width * 3,
            "meter": Meter(stage="preprocess", collector=collector),
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=pools.actors, max_tasks_in_flight_per_actor=4 if largest < SHORT else 2
        ),
        num_cpus=cpus_each,
        **again,
    )
    if after is None:
        return dataset
    device = {"device": "cuda"} if after.gpu else {}
    resources = {"num_gpus": 1, "num_cpus": 0} if after.gpu else {"num_cpus": cpus_each}
    # map_batches is this one, but refuses GPUs without a number of rows; with one Ray Data would cut and join shards.
    return dataset.map_batches_internal(
        after.actor,
        fn_constructor_kwargs={
            "sink": after.sink,
            "threads": threads,
            "wait_ms": store_ms,
            "meter": Meter(stage=after.name, collector=collector),
            **after.arguments,
            **device,
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pools.after, max_tasks_in_flight_per_actor=after.in_flight),
        **resources,
        **again,
    )


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a run has to do: `work` in all, of which `left` is not in the journal; and then `endings`, files
    of the output itself. `image_ids`: what `work` calls the images of the source, in its order. `claim`:
    what it changes in the output before it begins; None: nothing is written. `skipped`: what the listing left
    out, by suffix."""

    recipe: Recipe
    work: pa.Table
    left: pa.Table
    image_ids: pa.ChunkedArray
    endings: tuple[str, ...] = ()
    claim: journal.Claim | None = None
    shard_bytes: int = 0  # that an actor takes for the largest shard, as far as known
    skipped: Mapping[str, int] = field(default_factory=dict)


def plan(settings: Settings) -> Todo:
    """List the input, and take off what an earlier run into the same output has done.

    Raises:
        UsageError: the settings, the input or the output cannot be used. Nothing was changed.
    """
    settings.check()
    check_apart(settings)
    recipe = catalog.get(settings.recipe)
    backend_module(settings.backend).check(recipe)
    listed = look(
        settings.input, annotations=settings.annotations, limit=settings.limit, seed=settings.seed
    )
    source = wanted_by(
        listed.rows, needs_boxes=recipe.needs_boxes, drops_crowds=recipe.drops_crowds
    )
    if not source.num_rows:
        raise UsageError(
            f"No image of {settings.input!r} has boxes, which recipe {recipe.name} needs. Give --annotations."
        )
    check_cache_names(settings, source)
    annotations = (
        (annotations_of(settings.annotations),)
        if settings.annotations is not None and _annotates(settings)
        else ()
    )
    if annotations and settings.output is not None:
        check_annotation_ids(source, str(settings.annotations))
    return left_to_do(
        settings,
        recipe,
        source,
        deciding(settings, recipe),
        results=result_names(settings),
        endings=annotations,
        skipped=listed.skipped,
    )


def _annotates(settings: Settings) -> bool:
    """Whether the run writes the COCO JSON of its results. MLPerf's loader takes the original one beside its cache."""
    return settings.annotations is not None and settings.mlperf_cache is None


def left_to_do(
    settings: Settings,
    recipe: Recipe,
    source: pa.Table,
    decides: dict[str, Any],
    *,
    results: tuple[str, ...],
    endings: tuple[str, ...] = (),
    skipped: Mapping[str, int] | None = None,
) -> Todo:
    """The images of `source` (schema SOURCE) in shards, less what an earlier run into the same output has done.

    Args:
        decides: what decides the results, JSON types: an output made with other is refused.
        results: what the results are called (`journal.Made`).
        endings: files of the output that are written when all shards are done.
        skipped: what the listing left out, by suffix.

    Raises:
        UsageError: the output is of another run, or cannot be used. Nothing was changed.
    """
    check_report(settings.report)
    shape = sizes.cut(
        recipe,
        images=source.num_rows,
        rows=settings.shard_rows,
        scratch=backend_module(settings.backend).SCRATCH,
        memory=settings.memory,
        max_pixels=settings.max_pixels,
    )
    cut: dict[str, Any] = {**shape.arguments, "taper": settings.shard_rows is None}
    root = settings.output
    if root is None:
        work = make_work(source, **cut)
        ids = source.column("image_id")
        return Todo(
            recipe=recipe,
            work=work,
            left=work,
            image_ids=ids,
            endings=endings,
            shard_bytes=shape.need,
            skipped=skipped or {},
        )
    found = journal.look(root, decides, resume=settings.resume)
    stored, done = found.work, found.done
    if stored is None:
        work = here = fresh = make_work(source, **cut)
        wanted = [*endings, *journal.named(results, work)]
    else:
        source = named_as_before(source, stored)
        stored = requeued(stored, found.waiting, **cut)
        work = extend(renewed(stored, source, done), source, **cut)
        here = work.filter(
            pc.is_in(work.column("image_id"), source.column("image_id").combine_chunks())
        )
        fresh = work.filter(
            pc.invert(pc.is_in(work.column("image_id"), stored.column("image_id").combine_chunks()))
        )
        wanted = [*journal.named(results, fresh)]
    check_free(root, wanted, ours=set(journal.owned(root)[0]) if found.clearing else set())
    claim = journal.Claim(
        root=root,
        clears=found.clearing,
        made=journal.Made(settings=decides, versions=versions(), results=results, endings=endings),
        work=None if found.work is not None and work.equals(found.work) else work,
        seen=found.seen,
    )
    left = remaining(here, done)
    return Todo(
        recipe=recipe,
        work=here,
        left=left,
        image_ids=source.column("image_id"),
        endings=endings,
        claim=claim,
        shard_bytes=shape.need,
        skipped=skipped or {},
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run does: images are preprocessed as `settings` and `todo` say, and taken by the stage `after`, where there is one.

    given: what the user asked for, for the report.
    conclude: called with all images that were delivered when their shards are done; what it returns is added to the report,
        but for "dropped": boxes (journal.Dropped) that it found to be none.
    """

    settings: Settings
    given: dict[str, Any]
    todo: Todo
    after: After | None
    conclude: Callable[[list[journal.Written]], dict[str, Any]]

    @property
    def auto(self) -> tuple[str, ...]:
        """The stages whose actor count is left to the planner."""
        counts = {"preprocess": self.settings.actors} | (
            {self.after.name: self.after.actors} if self.after else {}
        )
        return tuple(stage for stage, count in counts.items() if count == "auto")

    @property
    def pixels(self) -> Preprocessing:
        """What preprocess actors do."""
        given = self.settings
        return Preprocessing(
            recipe=self.todo.recipe,
            backend=given.backend,
            seed=given.seed,
            max_pixels=given.max_pixels,
            memory=given.memory,
            image_seconds=given.image_seconds,
            decoder=given.decoder,
            damaged=given.damaged,
        )


def preprocessing(settings: Settings) -> Job:
    """The run of jobs/preprocess.py.

    Raises:
        UsageError: the settings, the input or the output cannot be used. Nothing was changed.
    """
    todo = plan(settings)
    after = writing(settings, todo.recipe)

    def conclude(written: list[journal.Written]) -> dict[str, Any]:
        if settings.annotations is None or after is None or not _annotates(settings):
            return {}
        rows = ((w.image_id, w.file, w.height, w.width, w.boxes, w.annotation_ids) for w in written)
        placed = dict(_placed(settings, todo, written))
        kept = write_annotations(
            settings.annotations, after.sink.root, rows, folder=after.sink.folder, placed=placed
        )
        return {"shapes_dropped": kept.shapes_dropped}

    return Job(settings=settings, given=asdict(settings), todo=todo, after=after, conclude=conclude)


def _placed(
    settings: Settings, todo: Todo, written: Iterable[journal.Written]
) -> Iterator[tuple[str, Placement]]:
    """Where the recipe put each image, for the shapes of its annotations. Left out: where that cannot be told again."""
    ids = todo.work.column("image_id").to_pylist()
    known = zip(unlist(todo.work.column("boxes")), frames_of(todo.work).tolist(), strict=True)
    boxes = dict(zip(ids, known, strict=True))
    for image in written:
        if len(image.source) != 2 or image.image_id not in boxes:
            continue
        size = image.source[0], image.source[1]
        of, frame = boxes[image.image_id]
        try:
            of, _ = into_picture(of, (frame[0], frame[1]), size, image.orientation)
            plan = todo.recipe.plan(
                seed=settings.seed, epoch=0, image_id=image.image_id, size=size, boxes=of
            )
            place = placement(plan.ops, size, image.orientation)
        except (Reject, UsageError):
            continue
        same = len(plan.boxes) == len(image.boxes) and np.allclose(
            plan.boxes, image.boxes, atol=0.01
        )
        if (
            same or not todo.recipe.random
        ):  # what is drawn may depend on the boxes, which may have been moved before
            yield image.image_id, place


def writing(settings: Settings, recipe: Recipe) -> After | None:
    """The stage that writes what preprocess made; None: nothing is written."""
    if settings.output is None:
        return None
    root = location.absolute(settings.output)
    return After(
        name="write",
        noun="writers",
        doing=f"writing {settings.format}",
        actor=Write,
        sink=Sink(
            format=settings.format,
            root=root,
            folder=image_folder(settings),
            quality=settings.quality,
            keeps_suffix=settings.mlperf_cache is not None,
        ),
        arguments={"backend": settings.backend, "finish": stored_as(settings, recipe)},
        actors=settings.writers,
        libraries=settings.backend,
        share=0.25,
        # Ray Data hands out tasks ten times a second: two short ones would leave a writer without work for most of that.
        in_flight=4,
    )


@dataclass
class _Tally:
    """What came out of the execution so far."""

    outputs: list[tuple[float, int]] = field(default_factory=list)
    images: int = 0
    rejected: int = 0
    unread: int = 0
    damaged: int = 0  # delivered all the same
    # Of blocks of pixels; writers put theirs in the journal.
    became: Became = field(default_factory=Became)
    told: float = 0.0

    @property
    def rate(self) -> str:
        """Images/s since the first shard came out, for a person: neither the actors' start nor what is still to come."""
        took = self.outputs[-1][0] - self.outputs[0][0] if self.outputs else 0.0
        return f"{(self.images - self.outputs[0][1]) / took:.0f}" if took else "-"

    def count(self, block: pa.Table, at_s: float) -> None:
        if "image" in block.column_names:
            bad = (
                block.filter(pc.is_valid(block.column("reason")))
                .select(journal.REJECTS.names)
                .to_pylist()
            )
            self.became.dropped.extend(
                dropped_of(block.select(("image_id", "uri", "boxes_dropped")).to_pylist())
            )
            self.became.boxes_from.update(block.column("boxes_from").drop_null().to_pylist())
            rejects, waiting = rejected_of(bad), unread_of(bad)
            self.became.rejected.extend(rejects)
            self.became.unread.extend(waiting)
            images, rejected, unread = block.num_rows, len(rejects), len(waiting)
            self.damaged += block.num_rows - block.column("detail").null_count - rejected - unread
        else:
            images, rejected, unread = (
                pc.sum(block.column(name)).as_py() for name in ("images", "rejected", "unread")
            )
        self.unread += unread
        self.images += images
        self.rejected += rejected
        self.outputs.append((at_s, images))

    def tell(self, collector: ray.actor.ActorHandle) -> None:
        """Those who watch want to know; twice a second is enough for them."""
        now = time.time()
        if now - self.told >= 0.5:
            collector.progress.remote(now, self.images, self.rejected)
            self.told = now


def run(
    settings: Settings,
    *,
    consume: Callable[[pa.Table], None] | None = None,
    console: Console | None = None,
    began: Callable[[Control], None] = lambda control: None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Do what `settings` say, to the end. `start` does the same in the background.

    Args:
        consume: called with each block of pixels (schema BLOCK), when nothing is written.
        console: what to tell the user on; by default the terminal (stderr).
        began: called when the execution begins, with what looks at the run and scales it.
        stop: when it is set, the run ends as by Ctrl-C.

    Raises:
        UsageError: the message is for the user; nothing was started.
        KeyboardInterrupt: results so far are kept, and the same settings go on.
    """
    how: dict[str, Any] = {"consume": consume, "console": console, "began": began, "stop": stop}
    return carry_out(lambda: preprocessing(settings), source=settings.input, **how)


def carry_out(
    make: Callable[[], Job],
    *,
    source: str,
    consume: Callable[[pa.Table], None] | None = None,
    console: Console | None = None,
    began: Callable[[Control], None] = lambda control: None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Do the job that `make` makes of the images of `source`, to the end; the other arguments are those of `run`, and so is what it raises."""
    started = time.time()
    console = console or Console(stderr=True)
    touched = False

    def touch() -> None:
        nonlocal touched
        touched = True

    try:
        say(console, f"Listing {source} ...")
        job = make()
        run_id = job.settings.run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        if not job.todo.left.num_rows:
            return _nothing_left(job, run_id, console=console, touch=touch)
        return _execute(
            job,
            run_id,
            console=console,
            consume=consume,
            began=began,
            stop=stop or threading.Event(),
            started=started,
            touch=touch,
        )
    except KeyboardInterrupt as error:
        if not touched:
            raise Untouched from error
        raise


def _nothing_left(job: Job, run_id: str, *, console: Console, touch: Callable[[], None]) -> Outcome:
    """The outcome of a run that finds all shards done. It makes the end again where that is missing."""
    settings, todo = job.settings, job.todo
    root, total = str(settings.output), todo.work.num_rows
    of_journal = became(root, todo.work)
    if lost := total - len(of_journal.written) - len(of_journal.rejected) - len(of_journal.unread):
        raise UsageError(
            f"The journal in {root} says that all shards are done, but its entries have {lost} of {total} images neither as written nor as "
            f"rejected: somebody changed it, or it is a defect of raypipe. --no-resume does all of them again."
        )
    covered = covers(root, todo.work)
    if covered:
        say(
            console,
            f"Nothing to do: all {total} images of {settings.input} are done, in {root}. --no-resume does them again.",
        )
    else:
        say(
            console,
            f"All {total} images of {settings.input} are done, in {root}; the run that did the last of them did not come to its end. "
            f"Writing its report from the journal ...",
        )
    if covered and all(location.exists(location.join(root, file)) for file in todo.endings):
        return Outcome(
            report=None, rejected=of_journal.rejected, unread=of_journal.unread, rows=total
        )
    assert todo.claim is not None
    with journal.claimed(
        todo.claim, run_id=run_id, tell=partial(say, console), check=lambda file: touch()
    ):
        if covered:
            job.conclude(of_journal.written)
            return Outcome(
                report=None, rejected=of_journal.rejected, unread=of_journal.unread, rows=total
            )
        counts = of_journal.counts(rows=total, before=total, skipped=todo.skipped)
        report = reports.unmeasured(
            run_id=run_id, settings=job.given, versions=versions(), counts=counts
        )
        return _conclude(job, report, of_journal)


class Run:
    """A run in the background, of a notebook or a program: looked at and scaled while it goes on."""

    def __init__(self, do: Callable[..., Outcome]):  # with `began` and `stop`, as `run`
        self._stop = threading.Event()
        self._began = threading.Event()
        self._control: Control | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

        def begin(control: Control) -> None:
            self._control = control
            self._began.set()

        def work() -> None:
            try:
                self._outcome = do(began=begin, stop=self._stop)
            except BaseException as error:  # it belongs to whoever waits
                self._error = error
            finally:
                self._began.set()

        self._thread = threading.Thread(target=work, name="raypipe-run", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def live(self) -> dict[str, Any]:
        """How it goes (`Control.live`). Waits for the execution to begin; raises UsageError when it has ended."""
        return self._begun().live()

    def scale(self, **counts: int) -> dict[str, int]:
        """Have so many actors, as in scale(preprocess=8, write=4) (`Control.scale`)."""
        return self._begun().scale(counts)

    def stop(self) -> None:
        """End it after the shards that are under way come out; what is finished is kept, and the same settings go on."""
        self._stop.set()

    def wait(self) -> Outcome:
        """Its outcome, when it has ended; raises what `run` raises."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def _begun(self) -> Control:
        self._began.wait()
        if self._control is None:
            self.wait()
            raise UsageError("This run had nothing to do.")
        return self._control


def start(
    settings: Settings,
    *,
    consume: Callable[[pa.Table], None] | None = None,
    console: Console | None = None,
) -> Run:
    """Begin a run in the background; the arguments are those of `run`."""
    return Run(partial(run, settings, consume=consume, console=console))


@dataclass(frozen=True, kw_only=True)
class _Executed:
    """What is known of an execution when it has ended. `begun_at` and `wall_s`: seconds, of a clock and long; `driver_cpu_s`: of this process, with
    whatever consumes the blocks."""

    session: Session
    after: After | None
    pools: Pools
    predicted: float | None  # images/s, by the planner, beforehand
    begun_at: float
    wall_s: float
    driver_cpu_s: float
    snapshot: dict[str, Any]
    cpu_percent: float | None
    tally: _Tally


def _execute(
    job: Job,
    run_id: str,
    *,
    console: Console,
    consume: Callable[[pa.Table], None] | None,
    began: Callable[[Control], None],
    stop: threading.Event,
    started: float,
    touch: Callable[[], None],
) -> Outcome:
    settings, todo, after = job.settings, job.todo, job.after
    if job.todo.left.num_rows < todo.work.num_rows:
        total = todo.work.num_rows
        say(console, f"Going on: {total - todo.left.num_rows} of {total} images are done already.")
    left = todo.left.num_rows
    how: dict[str, Any] = {
        "threads": settings.threads,
        "reading": reading(settings),
        "read_ms": settings.read_ms,
        "store_ms": settings.store_ms,
    }
    probe = (
        probes.Probe(rows=todo.left, settings=job.pixels, after=after, **how) if job.auto else None
    )
    timing = probes.start(probe) if probe else None
    say(console, "Starting Ray ..." if not os.environ.get("RAY_ADDRESS") else "Joining Ray ...")
    try:
        with ray_session(settings, after=after, shard_bytes=todo.shard_bytes) as session:
            costs = probes.finish(timing) if timing else None
            after = after and seated(after, session)
            pools = size_pools(settings, costs, session, images=left, after=after)
            facts = Facts(
                input=settings.input,
                output=settings.output,
                recipe=todo.recipe.name,
                backend=settings.backend,
                images=left,
                cores=session.cores,
                at_most=session.at_most,
                auto=job.auto,
                on_gpu=(after.name,) if after and after.gpu else (),
                gpus=session.gpus,
            )
            how |= {"cpus_each": session.cpus_each, "after": after, "run_id": run_id}
            with (
                _claimed(job, run_id, session, console=console, touch=touch) as held,
                registered(run_id, address=session.address, output=settings.output),
                collecting(run_id, facts) as collector,
            ):
                dataset = preprocessed(
                    todo.left, job.pixels, pools=pools, collector=collector, **how
                )
                say(console, _opening(run_id, job, after, session, pools))
                say(console, watching(run_id, session))
                machine = psutil.cpu_times()
                begun, begun_at, driver_cpu_s = (
                    time.perf_counter(),
                    time.time(),
                    time.process_time(),
                )
                collector.begin.remote(begun_at)
                began(Control(run_id, collector))
                tally = _Tally()
                # Fetching ahead is for blocks of other nodes: here it would only hand each block on a block later.
                ahead = 1 if session.nodes > 1 and after is None else 0
                with tracks(run_id), _progress(console, left) as show:
                    for block in dataset.iter_batches(
                        batch_size=None, batch_format="pyarrow", prefetch_batches=ahead
                    ):
                        tally.count(block, time.perf_counter() - begun)
                        tally.tell(collector)
                        show(tally)
                        if consume is not None and after is None:
                            consume(block)
                        if stop.is_set():
                            raise KeyboardInterrupt
                        held()
                wall_s, driver_cpu_s = (
                    time.perf_counter() - begun,
                    time.process_time() - driver_cpu_s,
                )
                snapshot, cpu_percent = collected(collector, since=machine)
                executed = _Executed(
                    session=session,
                    after=after,
                    pools=pools,
                    predicted=_predicted(costs, pools, session, after),
                    begun_at=begun_at,
                    wall_s=wall_s,
                    driver_cpu_s=driver_cpu_s,
                    snapshot=snapshot,
                    cpu_percent=cpu_percent,
                    tally=tally,
                )
                # Before Ray ends, which takes seconds: whoever is killed then has its report.
                return _account(job, run_id, executed, setup_s=begun_at - started)
    finally:
        if probe is not None and timing is not None:
            probes.end(timing, probe)


@contextmanager
def _claimed(
    job: Job, run_id: str, session: Session, *, console: Console, touch: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """The output for this run alone, where something is written. Yields what raises LeaseLost once it is not."""
    claim = job.todo.claim
    if claim is None:
        touch()
        yield lambda: None
        return

    def check(file: str) -> None:
        if session.nodes > 1 and not location.is_remote(file):
            check_shared(file, option=f"{claim.option} {claim.root!r}")
        touch()

    with journal.claimed(claim, run_id=run_id, tell=partial(say, console), check=check) as lease:
        yield lease.check


def _predicted(
    costs: list[planner.StageCost] | None, pools: Pools, session: Session, after: After | None
) -> float | None:
    counts = {"preprocess": pools.actors} | ({after.name: pools.after} if after else {})
    if (
        costs is None
        or counts.keys() != {cost.name for cost in costs}
        or (after is not None and after.gpu)
    ):
        return None
    return planner.bound(planner.with_actors(costs, counts), planner.Machine(cores=session.cores))[
        0
    ]


def _account(job: Job, run_id: str, executed: _Executed, *, setup_s: float) -> Outcome:
    """Write and return what became of the rows, and what it cost."""
    settings, todo, after = job.settings, job.todo, executed.after
    tally, snapshot = executed.tally, executed.snapshot
    total = todo.work.num_rows
    rows = became(str(settings.output), todo.work) if after else tally.became
    out = None if after else tally.images - tally.rejected - tally.unread
    report = reports.build(
        run_id=run_id,
        settings=job.given,
        versions=versions(),
        hardware=hardware(executed.session),
        counts=rows.counts(
            rows=total,
            before=total - todo.left.num_rows,
            out=out,
            damaged=tally.damaged,
            skipped=todo.skipped,
        ),
        clock=reports.Clock(
            wall_s=executed.wall_s,
            setup_s=setup_s,
            ready_s=_ready_at(snapshot, executed.pools.actors, default=executed.begun_at)
            - executed.begun_at,
            outputs=tally.outputs,
        ),
        cpu_percent=executed.cpu_percent,
        driver_cpu_s=executed.driver_cpu_s,
        stage_names=["preprocess"] + ([after.name] if after else []),
        on_gpu=(after.name,) if after and after.gpu else (),
        snapshot=snapshot,
        predicted=executed.predicted,
    )
    return _conclude(job, report, rows)


def _conclude(job: Job, report: dict[str, Any], rows: Became) -> Outcome:
    """Write what a run leaves at its end, the report last: it says which shards all of it covers."""
    settings, todo, after = job.settings, job.todo, job.after
    dropped = rows.dropped
    pictures = (
        shown(todo.work, rows.rejected) if after is not None or settings.report is not None else []
    )
    if after is not None:
        extra = job.conclude(rows.written)
        dropped = extra.pop("dropped", dropped)
        report |= {**extra, "boxes_dropped": len(dropped)}
        report["shards"] = ranges(todo.work.column("shard").to_pylist())
        journal.clear_temporary(after.sink.root)  # what killed actors had under way
        leave_report(after.sink.root, f"{journal.STATE}/", report, rows.rejected, pictures, dropped)
    if settings.report is not None:
        leave_report(settings.report, "", report, rows.rejected, pictures, dropped)
    return Outcome(
        report=report, rejected=rows.rejected, unread=rows.unread, rows=todo.work.num_rows
    )


def _opening(run_id: str, job: Job, after: After | None, session: Session, pools: Pools) -> str:
    then = (
        f", {pools.after} {after.doing}{' on GPU' if after.gpu else ''}"
        if after
        else ", nothing written"
    )
    dashboard = f"; Ray dashboard: http://{session.dashboard}" if session.dashboard else ""
    return (
        f"Run {run_id}: {job.todo.left.num_rows} images, recipe {job.todo.recipe.name}, {job.settings.backend}; "
        f"actors: {pools.actors} preprocessing{then}; {session.cores:g} cores{dashboard}"
    )


def watching(run_id: str, session: Session) -> str:
    """How the run is watched from elsewhere, in a line."""
    there = f" --address {session.address}" if session.joined else ""
    return f"Watch it: raypipe watch {run_id}{there}"


def _ready_at(snapshot: dict[str, Any], actors: int, *, default: float) -> float:
    """The mean moment at which the preprocess actors that the run began with could begin: they start one after the other."""
    ready = sorted(sample["at"] for sample in snapshot["first"] if sample["stage"] == "preprocess")[
        :actors
    ]
    return sum(ready) / len(ready) if ready else default


def collected(
    collector: ray.actor.ActorHandle, *, since: Any
) -> tuple[dict[str, Any], float | None]:
    """What the collector knows: its snapshot, and the mean use of all cores, 0 to 100, since `since` (psutil.cpu_times() of this node)."""
    try:
        snapshot = ray.get(collector.snapshot.remote(), timeout=SNAPSHOT_AT_MOST_S)
        here = ray.get_runtime_context().get_node_id()
        others = [seen for node, seen in snapshot["nodes"].items() if node != here]
    except (
        RayError
    ):  # it was killed, or its node: what the stages cost died with it, and nothing else
        snapshot, others = dict(reports.NOTHING_SEEN), []
    cpu_percent = _cpu_percent(since, psutil.cpu_times(), others)
    return snapshot, cpu_percent


SNAPSHOT_AT_MOST_S = 60.0


def _cpu_percent(before, after, others: list[dict[str, float]]) -> float | None:
    """Mean use of all cores, 0 to 100: of this node between two psutil.cpu_times(), and of `others` as their actors saw it."""
    used = busy_cpu_s(after) - busy_cpu_s(before) + sum(node["cpu_busy_s"] for node in others)
    total = sum(after[:8]) - sum(before[:8]) + sum(node["cpu_total_s"] for node in others)
    return 100 * used / total if total else None


@contextmanager
def tracks(run_id: str) -> Iterator[None]:
    """Where a run's actors leave their tracks is cleared on this node afterwards."""
    try:
        yield
    finally:
        shutil.rmtree(tracks_folder(run_id), ignore_errors=True)


def tracks_folder(run_id: str) -> str:
    """Where the preprocess actors of a run leave their tracks, on each node."""
    return os.path.join(tempfile.gettempdir(), f"raypipe-{run_id}")


LINE_EVERY_S = 5.0


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[_Tally], None]]:
    """A progress bar in a terminal; elsewhere (a log, `ray job submit`) a line every few seconds."""
    begun = said = time.perf_counter()
    if not console.is_terminal:

        def line(tally: _Tally) -> None:
            nonlocal said
            now = time.perf_counter()
            if now - said >= LINE_EVERY_S or tally.images == total:
                said = now
                console.print(
                    f"{tally.images}/{total} images, {tally.rejected} rejected, {tally.rate} images/s, {now - begun:.0f} s",
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
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting actors", total=total, rate="-", rejected=0)

        def bar(tally: _Tally) -> None:
            progress.update(
                task,
                description="images",
                completed=tally.images,
                rate=tally.rate,
                rejected=tally.rejected,
            )

        yield bar
