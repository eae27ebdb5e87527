"""A run: stages put on Ray Data and watched to their end. The only place that builds datasets."""

import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raypipe import UsageError
from raypipe.data import journal, location
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink, write_annotations
from raypipe.data.sources import list_images
from raypipe.data.work import extend, make_work, remaining, shard_rows, shards, wanted_by
from raypipe.images import backend as backend_module
from raypipe.images import catalog
from raypipe.images.decode import MAX_PIXELS, thumbnail
from raypipe.images.recipe import Recipe, to_json
from raypipe.insight import html
from raypipe.insight import report as reports
from raypipe.run.meter import Meter, busy_cpu_s, start_collector
from raypipe.run.scaling import observe
from raypipe.stages.preprocess import TRIES, Preprocess, Preprocessing
from raypipe.stages.write import Write

COUNT = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What jobs/preprocess.py takes. The first group decides the results, the second only how they come about."""

    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT."""
    annotations: str | None = None
    """COCO JSON with the boxes; --input is then the folder its file names are relative to."""
    output: str | None = None
    """Where results go. Without it nothing is written: preprocessing only."""
    recipe: str = "coco-300"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    backend: Literal["opencv", "torchvision"] = "opencv"
    """Library that decodes and transforms."""
    format: Literal["jpeg", "png", "npy", "webdataset", "parquet"] = "jpeg"
    """How results are stored."""
    quality: int = 95
    """JPEG quality of what is written, 1 to 100."""
    limit: int | None = None
    """Only the first so many images."""
    seed: int = 0
    """Of random augmentations, and of the demo images."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected before they are decoded."""

    actors: COUNT = "auto"
    """Preprocess actors; auto: one a core."""
    writers: COUNT = "auto"
    """Writer actors; auto: one for four cores."""
    threads: int = 1
    """Threads that OpenCV or torch may use within each actor."""
    shard_rows: int | None = None
    """Images a shard; by default as many as make 64 MiB of output."""
    max_reject_fraction: float = 0.01
    """The run fails when more than this share of the images was rejected; results are kept."""
    run_id: str | None = None
    """Name of this run; by default made from the time."""
    resume: bool = True
    """--no-resume deletes the results of earlier runs into --output and starts again."""
    report: str | None = None
    """Folder for report.json and rejects.parquet too; by default only OUTPUT/_raypipe."""

    def check(self) -> None:
        """Raises UsageError for a value that no run can use."""
        positive = {"limit": self.limit, "actors": self.actors, "writers": self.writers, "threads": self.threads}
        positive |= {"shard-rows": self.shard_rows, "max-pixels": self.max_pixels}
        for name, value in positive.items():
            if isinstance(value, int) and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1.")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality is {self.quality}; JPEG quality goes from 1 to 100.")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UsageError(f"--max-reject-fraction is {self.max_reject_fraction}; it is a share, from 0 to 1.")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; it must not be negative.")
        if self.run_id is not None and not all(c.isalnum() or c in "-_." for c in self.run_id or "/"):
            raise UsageError(f"--run-id is {self.run_id!r}; use letters, digits, '-', '_' and '.' only.")


def deciding(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The settings that decide the results of a run, as JSON types: what an output directory must agree with."""
    quality = settings.quality if settings.format in ("jpeg", "webdataset") else None
    return {
        "input": settings.input if settings.input.startswith("demo") else location.absolute(settings.input),
        "annotations": settings.annotations and location.absolute(settings.annotations),
        "recipe": {key: value for key, value in to_json(recipe).items() if key != "description"},
        "backend": settings.backend,
        "format": settings.format,
        "quality": quality,
        "seed": settings.seed,
        "max_pixels": settings.max_pixels,
    }


def check_apart(settings: Settings) -> None:
    """Raises UsageError where results would overwrite what they are made from, or be taken for input the next time."""
    if settings.output is None or settings.input.startswith("demo") or location.is_remote(settings.input):
        return
    if location.is_remote(settings.output):
        return
    source, output = os.path.realpath(settings.input), os.path.realpath(settings.output)
    if os.path.isdir(source) and os.path.commonpath([source, output]) == source:
        raise UsageError(
            f"--output {settings.output!r} is the input folder {settings.input!r} or in it: results would overwrite originals, or be taken "
            f"for input by the next run. Nothing was started. Give a folder beside it."
        )


def check_free(settings: Settings, work: pa.Table) -> None:
    """Raises UsageError where a first run would overwrite a file that is no result of raypipe."""
    assert settings.output is not None
    extension = {"jpeg": ".jpg", "png": ".png", "npy": ".npy"}.get(settings.format)
    if location.is_remote(settings.output) or extension is None or not os.path.isdir(settings.output):
        return
    folder = os.path.join(location.local_path(settings.output), _folder(settings))
    for name in work.column("name").to_pylist():
        if os.path.lexists(os.path.join(folder, name + extension)):
            raise UsageError(
                f"{os.path.join(folder, name + extension)} exists and is no result of an earlier run: it would be overwritten. Nothing was "
                f"started. Give an --output without it."
            )


ACTOR_BYTES = {"opencv": 250 * 10**6, "torchvision": 600 * 10**6}
"""Memory that an actor has before it has an image (measured: resident, libraries included)."""


def versions() -> dict[str, str]:
    """Versions of what a run's results and speed depend on."""
    names = ("raypipe", "ray", "opencv-python-headless", "torch", "torchvision", "pillow", "numpy", "pyarrow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # PackageNotFoundError: raypipe itself, when only its source travels with a job
            found[name] = "source" if name == "raypipe" else "missing"
    return found


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Pools:
    """How many actors each stage gets; no writers when nothing is written."""

    actors: int
    writers: int

    @property
    def cpus(self) -> int:
        """Logical CPUs they take: one each."""
        return self.actors + self.writers


def size_pools(settings: Settings, *, cpus: int, joined: bool) -> Pools:
    """How many actors to start.

    Args:
        cpus: logical CPUs of the cluster that was joined, or cores of this machine.
        joined: a cluster's CPUs are shared out and not exceeded; a machine of our own may have more logical CPUs than cores.

    Raises:
        UsageError: the cluster has fewer CPUs than asked for.
    """
    writers = 0
    if settings.output is not None:
        writers = settings.writers if settings.writers != "auto" else max(1, cpus // 4)
    if settings.actors != "auto":
        actors = settings.actors
    else:
        actors = max(1, cpus - writers) if joined else cpus
    pools = Pools(actors, writers)
    memory = psutil.virtual_memory().total
    if not joined and pools.cpus * ACTOR_BYTES[settings.backend] > memory:
        raise UsageError(
            f"{actors} preprocess actors and {writers} writers need about {pools.cpus * ACTOR_BYTES[settings.backend] / 1e9:.0f} GB of memory; "
            f"this machine has {memory / 1e9:.0f} GB and {cpus} cores. Ask for fewer with --actors and --writers."
        )
    if joined and pools.cpus > cpus:
        raise UsageError(
            f"{actors} preprocess actors and {writers} writers take {pools.cpus} CPUs, one each, but the cluster has {cpus}: Ray would "
            f"wait for ever for the rest. Ask for fewer with --actors and --writers, or add nodes first."
        )
    return pools


@dataclass(frozen=True, kw_only=True)
class Session:
    """The Ray that a run uses."""

    pools: Pools
    cores: float  # physical on a machine of our own, logical CPUs of a cluster
    nodes: int
    dashboard: str | None


@contextmanager
def ray_session(settings: Settings, *, beside: int = 0) -> Iterator[Session]:
    """Join the cluster that RAY_ADDRESS names, use the Ray that this process has already, or start one for this run alone.

    Args:
        beside: CPUs that others than these pools take: the workers of a training.

    Raises:
        UsageError: the cluster has too few CPUs, or there is none at RAY_ADDRESS.
    """
    joined = bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()
    ours = not ray.is_initialized()
    dashboard = None
    if ours:
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            with _without_startup_lines():
                if joined:
                    context = ray.init(**quiet)
                else:
                    local = size_pools(settings, cpus=cores_here(), joined=False)
                    context = ray.init(address="local", num_cpus=max(local.cpus + beside, cores_here()), **quiet)
        except ConnectionError as error:
            raise UsageError(
                f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}, but no Ray cluster answers there ({error}). Start it, correct the "
                f"address, or unset RAY_ADDRESS to run on this machine alone."
            ) from error
        dashboard = context.dashboard_url or None
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        pools = size_pools(settings, cpus=cpus - beside, joined=True) if joined else local
        cores = min(cpus, cores_here()) if nodes == 1 else cpus
        yield Session(pools=pools, cores=cores, nodes=nodes, dashboard=dashboard)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _without_startup_lines() -> Iterator[None]:
    """Keep Ray's C++ account of itself off the terminal: a line for its log level at the start, and an alarming one for every actor
    pool, that its arguments are in the object store (as Ray Data puts them). They stay in Ray's log files; what raises still raises.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # What breaks a run is raised, and told in a line (broken_off); Ray Data would log its whole trace before, twice.
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def preprocessed(
    work: pa.Table,
    settings: Preprocessing,
    *,
    pools: Pools,
    threads: int = 1,
    io_threads: int = 1,
    sink: Sink | None = None,
    run_id: str,
    collector: ray.actor.ActorHandle | None = None,
) -> ray.data.Dataset:
    """The run as a dataset: blocks of pixels (schema BLOCK), or with a `sink` what the writers say of each shard (schema DONE).

    Nothing runs before it is consumed. One shard is one block is one call, all the way; rows of `work` are small.
    """
    tables = list(shards(work))
    dataset = ray.data.from_arrow(tables)
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A shard stays one block, however large.
    context.target_max_block_size = 2**62
    # The actors measure their own memory; Ray Data would start a thread for it in every task.
    context.memory_usage_poll_interval_s = None
    largest = max(table.num_rows for table in tables)
    if collector is not None:
        operators = {f"MapBatches({cls.__name__})": name for cls, name in ((Preprocess, "preprocess"), (Write, "write"))}
        observe(context, collector=collector, stages=operators)
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
            "io_threads": io_threads,
            "meter": Meter(stage="preprocess", collector=collector),
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pools.actors),
        num_cpus=1,
        **again,
    )
    if sink is None:
        return dataset
    return dataset.map_batches(
        Write,
        fn_constructor_kwargs={
            "sink": sink,
            "backend": settings.backend,
            "finish": settings.recipe.finish if sink.format == "npy" else None,
            "threads": threads,
            "meter": Meter(stage="write", collector=collector),
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pools.writers),
        num_cpus=1,
        **again,
    )


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a run has to do: `work` in all, of which `left` is not in the journal."""

    recipe: Recipe
    work: pa.Table
    left: pa.Table


def plan(settings: Settings) -> Todo:
    """List the input, and take off what an earlier run into the same output has done.

    Raises:
        UsageError: the settings, the input or the output cannot be used. Nothing was changed.
    """
    settings.check()
    check_apart(settings)
    recipe = catalog.get(settings.recipe)
    backend_module(settings.backend).check(recipe)
    listed = list_images(settings.input, annotations=settings.annotations, limit=settings.limit, seed=settings.seed)
    source = wanted_by(listed, needs_boxes=recipe.needs_boxes, drops_crowds=recipe.drops_crowds)
    if not source.num_rows:
        raise UsageError(f"No image of {settings.input!r} has boxes, which recipe {recipe.name} needs. Give --annotations.")
    height, width = recipe.fixed_size or (480, 640)
    rows = settings.shard_rows or shard_rows(rows=source.num_rows, row_bytes=height * width * 3)
    cut: dict[str, Any] = {"rows_per_shard": rows, "taper": settings.shard_rows is None}
    root = settings.output
    if root is None:
        work = make_work(source, **cut)
        return Todo(recipe=recipe, work=work, left=work)
    if not settings.resume:
        journal.clear(root)
    going_on = journal.check_settings(root, deciding(settings, recipe))
    stored = journal.read_work(root) if going_on else None
    if stored is None:
        journal.check_writable(root)
        work = here = make_work(source, **cut)
        check_free(settings, work)
    else:
        work = extend(stored, source, **cut)
        here = work.filter(pc.is_in(work.column("image_id"), source.column("image_id").combine_chunks()))
    if stored is None or work.num_rows > stored.num_rows:
        journal.put_work(root, work)
    if not going_on:
        journal.put_settings(root, deciding(settings, recipe), versions())
    return Todo(recipe=recipe, work=here, left=remaining(here, journal.done_shards(root)))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. `report` is None when there was nothing left to do; `rows` were to be accounted for."""

    report: dict[str, Any] | None
    rejected: list[journal.Rejected]
    rows: int


@dataclass
class _Tally:
    """What came out of the execution so far."""

    outputs: list[tuple[float, int]] = field(default_factory=list)
    images: int = 0
    rejected: int = 0
    rejects: list[journal.Rejected] = field(default_factory=list)  # of blocks of pixels; writers put theirs in the journal

    @property
    def rate(self) -> str:
        """Images/s since the first shard came out, for a person: neither the actors' start nor what is still to come."""
        took = self.outputs[-1][0] - self.outputs[0][0] if self.outputs else 0.0
        return f"{(self.images - self.outputs[0][1]) / took:.0f}" if took else "-"

    def count(self, block: pa.Table, at_s: float) -> None:
        if "image" in block.column_names:
            bad = block.filter(pc.is_valid(block.column("reason"))).select(journal.REJECTS.names).to_pylist()
            self.rejects.extend(journal.Rejected(**row) for row in bad)
            images, rejected = block.num_rows, len(bad)
        else:
            images, rejected = pc.sum(block.column("images")).as_py(), pc.sum(block.column("rejected")).as_py()
        self.images += images
        self.rejected += rejected
        self.outputs.append((at_s, images))


def run(settings: Settings, *, consume: Callable[[pa.Table], None] | None = None, console: Console | None = None) -> Outcome:
    """Do what `settings` say.

    Args:
        consume: called with each block of pixels (schema BLOCK), when nothing is written.
        console: what to tell the user on; by default the terminal (stderr).

    Raises:
        UsageError: the message is for the user; nothing was started.
        KeyboardInterrupt: results so far are kept, and the same settings go on.
    """
    started = time.time()
    console = console or Console(stderr=True)
    console.print(f"Listing {settings.input} ...", markup=False, highlight=False)
    todo = plan(settings)
    total, left = todo.work.num_rows, todo.left.num_rows
    if not left:
        console.print(
            f"Nothing to do: all {total} images of {settings.input} are done, in {settings.output}. --no-resume does them again.",
            markup=False,
        )
        return Outcome(report=None, rejected=_journaled(settings, todo)[1] if settings.output else [], rows=total)
    if left < total:
        console.print(f"Going on: {total - left} of {total} images are done already.")
    run_id = settings.run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    sink = None
    if settings.output is not None:
        sink = Sink(
            format=settings.format, root=location.absolute(settings.output), folder=_folder(settings), quality=settings.quality
        )
    pixels = Preprocessing(recipe=todo.recipe, backend=settings.backend, seed=settings.seed, max_pixels=settings.max_pixels)
    console.print("Starting Ray ..." if not os.environ.get("RAY_ADDRESS") else "Joining Ray ...")
    with ray_session(settings) as session:
        collector = start_collector(run_id)
        dataset = preprocessed(
            todo.left,
            pixels,
            pools=session.pools,
            threads=settings.threads,
            # One reads ahead of the decoder; more only contend for the interpreter, unless each waits for a network.
            io_threads=8 if location.is_remote(settings.input) else 1,
            sink=sink,
            run_id=run_id,
            collector=collector,
        )
        console.print(_opening(run_id, settings, todo, session), markup=False, highlight=False)
        machine = psutil.cpu_times()
        begun, begun_at = time.perf_counter(), time.time()
        collector.begin.remote(begun_at)
        tally = _Tally()
        with _tracks(run_id), _progress(console, left) as show:
            # Fetching ahead is for blocks of other nodes: here it would only hand each block on a block later.
            ahead = 1 if session.nodes > 1 and sink is None else 0
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=ahead):
                tally.count(block, time.perf_counter() - begun)
                show(tally)
                if consume is not None and sink is None:
                    consume(block)
        wall_s = time.perf_counter() - begun
        snapshot = ray.get(collector.snapshot.remote())
        here = ray.get_runtime_context().get_node_id()
        cpu_percent = _cpu_percent(machine, psutil.cpu_times(), [s for node, s in snapshot["nodes"].items() if node != here])
        ray.kill(collector)
    written, rejected = ([], tally.rejects) if sink is None else _journaled(settings, todo)
    reasons = Counter(row.reason for row in rejected)
    counts = reports.Counts(
        images_in=total,
        images_out=len(written) if sink else tally.images - tally.rejected,
        rejects_by_reason=dict(reasons.most_common()),
        before=total - left,
    )
    report = reports.build(
        run_id=run_id,
        settings=asdict(settings),
        versions=versions(),
        hardware=_hardware(session),
        counts=counts,
        clock=reports.Clock(
            wall_s=wall_s,
            setup_s=begun_at - started,
            ready_s=_ready_at(snapshot, session.pools.actors, default=begun_at) - begun_at,
            outputs=tally.outputs,
        ),
        cpu_percent=cpu_percent,
        stage_names=["preprocess"] + (["write"] if sink else []),
        snapshot=snapshot,
    )
    if sink is not None:
        if settings.annotations is not None:
            rows = ((w.image_id, w.file, w.height, w.width, w.boxes, w.annotation_ids) for w in written)
            write_annotations(settings.annotations, sink.root, rows, folder=sink.folder)
        _leave_report(sink.root, f"{journal.STATE}/", report, todo, rejected)
        location.delete_folder(location.join(sink.root, sink.tmp))  # what killed actors had under way
    if settings.report is not None:
        _leave_report(settings.report, "", report, todo, rejected)
    return Outcome(report=report, rejected=rejected, rows=total)


def _folder(settings: Settings) -> str:
    """Sub-folder of the output for the images. With annotations the layout is MLPerf's: the image folder beside annotations/."""
    return os.path.basename(location.path_of(settings.input).rstrip("/")) if settings.annotations else ""


def _journaled(settings: Settings, todo: Todo) -> tuple[list[journal.Written], list[journal.Rejected]]:
    """What the journal says of the rows of `todo`, in their order."""
    assert settings.output is not None
    wanted = set(todo.work.column("image_id").to_pylist())
    entries = list(journal.read_entries(settings.output, pc.unique(todo.work.column("shard")).to_pylist()))
    written = [row for entry in entries for row in entry.written if row.image_id in wanted]
    rejected = [row for entry in entries for row in entry.rejected if row.image_id in wanted]
    return written, rejected


def _leave_report(folder: str, prefix: str, report: dict[str, Any], todo: Todo, rejected: list[journal.Rejected]) -> None:
    shown = _shown(todo, rejected)
    page = html.page(report, rejects=shown, more_rejects=len(rejected) - len(shown))
    files = {
        "rejects.parquet": journal.rejects_parquet(rejected),
        "report.json": json.dumps(report, indent=1).encode(),
        "report.html": page.encode(),
    }
    for name, data in files.items():
        location.write(folder, prefix + name, data, tmp=f"{journal.STATE}/tmp" if prefix else "")


SHOWN_PER_REASON, SHOWN = 3, 12


def _shown(todo: Todo, rejected: list[journal.Rejected]) -> list[dict[str, Any]]:
    """A few rejects of each reason with what can be seen of them, for the report's page."""
    count: Counter[str] = Counter()
    rows: list[journal.Rejected] = []
    for row in rejected:
        count[row.reason] += 1
        if count[row.reason] <= SHOWN_PER_REASON and len(rows) < SHOWN:
            rows.append(row)
    # What kills an actor would kill the driver too.
    harmless = pa.array([row.image_id for row in rows if row.reason != "kills its process"], pa.string())
    work = todo.work.filter(pc.is_in(todo.work.column("image_id"), harmless))
    data = Reader(threads=0).read(work)
    seen = {i: thumbnail(d) for i, d in zip(work.column("image_id").to_pylist(), data, strict=True) if isinstance(d, bytes)}
    return [{**asdict(row), "thumbnail": seen.get(row.image_id)} for row in rows]


def _opening(run_id: str, settings: Settings, todo: Todo, session: Session) -> str:
    pools = session.pools
    writers = f", {pools.writers} writing {settings.format}" if pools.writers else ", nothing written"
    dashboard = f"; Ray dashboard: http://{session.dashboard}" if session.dashboard else ""
    return (
        f"Run {run_id}: {todo.left.num_rows} images, recipe {todo.recipe.name}, {settings.backend}; "
        f"actors: {pools.actors} preprocessing{writers}; {session.cores:g} cores{dashboard}"
    )


def _ready_at(snapshot: dict[str, Any], actors: int, *, default: float) -> float:
    """The mean moment at which the preprocess actors that the run began with could begin: they start one after the other."""
    ready = sorted(sample["at"] for sample in snapshot["first"] if sample["stage"] == "preprocess")[:actors]
    return sum(ready) / len(ready) if ready else default


def _hardware(session: Session) -> dict[str, Any]:
    return {
        "cores": session.cores,
        "nodes": session.nodes,
        "memory_bytes": psutil.virtual_memory().total,
        "processor": platform.processor() or platform.machine(),
    }


def _cpu_percent(before, after, others: list[dict[str, float]]) -> float | None:
    """Mean use of all cores, 0 to 100: of this node between two psutil.cpu_times(), and of `others` as their actors saw it."""
    used = busy_cpu_s(after) - busy_cpu_s(before) + sum(node["cpu_busy_s"] for node in others)
    total = sum(after[:8]) - sum(before[:8]) + sum(node["cpu_total_s"] for node in others)
    return 100 * used / total if total else None


@contextmanager
def _tracks(run_id: str) -> Iterator[None]:
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
            progress.update(task, description="images", completed=tally.images, rate=tally.rate, rejected=tally.rejected)

        yield bar


def broken_off(error: BaseException) -> str:
    """Why an execution ended early, in a line, and where the rest of Ray's account is: a file, for it runs over pages."""
    trace = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile("w", prefix="raypipe-error-", suffix=".log", delete=False) as file:
        file.write(trace)
    cause: BaseException = error
    while isinstance(below := getattr(cause, "cause", None) or cause.__cause__, BaseException):
        cause = below
    lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return f"{lines[-1].strip()}. All that Ray says of it is in {file.name}."


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished run counts as failed: rows lost, or too many rejected. None: it does not."""
    report = outcome.report
    if report is not None:
        lost = report["images_in"] - report["images_out"] - report["images_rejected"]
        if lost:
            return (
                f"{lost} of {report['images_in']} images are unaccounted for: {report['images_out']} came out and "
                f"{report['images_rejected']} were rejected. This is a defect of raypipe; run again to have them done, and report it."
            )
    share = len(outcome.rejected) / outcome.rows
    if share > settings.max_reject_fraction:
        where = " or ".join(f for f in (settings.output and f"{settings.output}/{journal.STATE}", settings.report) if f)
        first = outcome.rejected[0]
        return (
            f"{len(outcome.rejected)} of {outcome.rows} images were rejected ({100 * share:.1f}%), more than --max-reject-fraction "
            f"{settings.max_reject_fraction:g} allows; what was good is kept. The first: {first.uri}: {first.reason} ({first.detail}). "
            + (f"All are in {where}/rejects.parquet." if where else "Give --report FOLDER to get them all.")
        )
    return None
