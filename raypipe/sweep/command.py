"""A sweep: the talk's measurements, one run a point, all on one Ray. It goes on where it was, and ends with a table and a page.

    DIR/results.parquet, results.csv   a row a measurement (schema RESULTS), written after each
    DIR/sweep.html                     the talk's claims, judged by them, with their figures
    DIR/_raypipe/run.json              the settings that all rows share, which another command into DIR must agree with

A point's run is told to begin when all its actors are there: what is measured is work, not the start of processes.
"""

import contextlib
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
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
from raypipe.data import journal, lease, location
from raypipe.data.formats.parquet import read_table
from raypipe.data.reader import Reader
from raypipe.images import backend as backend_module
from raypipe.insight import planner
from raypipe.run import pipeline, result, training
from raypipe.run.causes import Untouched
from raypipe.run.session import (
    Session,
    cores_here,
    joins,
    memory_for,
    processor,
    ray_session,
    versions,
)
from raypipe.run.settings import Settings as Preprocess
from raypipe.run.settings import check_apart
from raypipe.run.starting import together
from raypipe.sweep import page as talk
from raypipe.sweep.claims import STAGES, Finding, Where, findings

Backend = Literal["opencv", "torchvision"]

TALKS_ACTORS = 20
"""The most of the talk's grid. Shards are cut for so many also where a grid has fewer, so that it can grow: points with shards of different sizes
do not compare."""

SHARDS_AN_ACTOR = 2
"""At the point with the most actors. Each shard costs Ray about 20 ms of CPU, whatever is in it: an image that takes OpenCV 2.9 ms took an actor 4.9 ms
in shards of 12, 4.0 of 25, and 3.4 of 50 (medians of 2, 2 cores of an AMD EPYC, coco-300, 1 actor)."""

_OF_STAGE = (
    *(
        ("busy_s", "busy_s_per_image"),
        ("cpu_s", "cpu_s_per_image"),
        ("core_wait_s", "core_wait_s_per_image"),
    ),
    *((name, name) for name in ("busy", "starved", "blocked", "cpu_percent")),
)
"""Columns of each stage, and where a report has them: seconds an image, shares of its actors' time, percent of all cores."""

RESULTS = pa.schema(
    [
        (
            "kind",
            pa.string(),
        ),  # preprocess; store and stored: once to Parquet, and read back; train; ops: train, with the ops on the device
        ("backend", pa.string()),
        ("actors", pa.int32()),
        ("writers", pa.int32()),
        ("workers", pa.int32()),
        ("device", pa.string()),  # that trains: cpu, gpu, or empty
        ("threads", pa.int32()),
        ("repeat", pa.int32()),
        ("images", pa.int64()),
        ("time_s", pa.float64()),  # from when all actors were ready to the last image
        ("images_per_s", pa.float64()),
        ("cpu_percent", pa.float64()),  # of all cores, in time_s
        ("gpu_percent", pa.float64()),
        *((f"{stage}_{name}", pa.float64()) for stage in STAGES for name, _ in _OF_STAGE),
        ("overhead_cpu_s", pa.float64()),  # of Ray itself, an image
        ("limit", pa.string()),  # a stage, or cores
        ("cores", pa.float64()),
        ("nodes", pa.int32()),
        ("at", pa.string()),  # ISO, UTC
        ("run_id", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What jobs/sweep.py takes: the talk's grid by default. The first group is the same for all points of an output directory."""

    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT."""
    output: str
    """Where the results go, and for the time of a measurement what it writes."""
    annotations: str | None = None
    """COCO JSON with the boxes; --input is then the folder its file names are relative to."""
    recipe: str = "coco-300"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    limit: int = 1000
    """Images a point."""
    format: Literal["jpeg", "png", "npy", "webdataset", "parquet"] = "jpeg"
    """How writers store."""
    quality: int = 95
    """JPEG quality of what is written, 1 to 100, the same for both backends."""
    seed: int = 0
    """Of random augmentations, the demo images, the weights, and the order of the points."""
    read_ms: float = 0.0
    """Have every image take so many milliseconds longer to read, as from a slow store."""
    store_ms: float = 0.0
    """Have every image take so many milliseconds longer to write: then writers limit on any machine, as in the talk."""
    shard_rows: int | None = None
    """Images a shard; by default so few that each of 20 actors gets 2 shards, or of more if a point has more."""
    max_reject_fraction: float = 0.01
    """The sweep ends as failed when a point rejected more than this share of its images."""

    actors: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 16, 20)
    """Preprocess actors. Points with more than the machine's cores are measured, and marked."""
    writers: tuple[Literal["none", "one", "same"], ...] = ("none", "one", "same")
    """Writer actors: none, one, as many as preprocess actors."""
    backends: tuple[Backend, ...] = ("opencv", "torchvision")
    """Libraries that decode, transform and encode. Each decodes JPEGs with its own decoder: the libraries are what is compared."""
    threads: tuple[int, ...] = (1,)
    """Threads that OpenCV or torch may use within each actor. More than one number: the others are measured without writers."""
    repeats: int = 3
    """How often each point is measured; medians are shown."""
    resume: bool = True
    """--no-resume deletes what was measured into --output and starts again."""

    train: bool = False
    """Measure training too, on GPUs if there are any."""
    train_input: str | None = None
    """Images with boxes to train on; by default --input."""
    train_recipe: str = "ssd-300-train"
    """Recipe of the training."""
    train_actors: tuple[int, ...] = (1, 2, 4, 8, 12)
    """Preprocess actors beside one training worker."""
    workers: tuple[int, ...] | None = None
    """Training workers beside one preprocess actor; by default 1 to as many as there are GPUs, or 1 and 2 on CPUs."""
    model: str | None = None
    """By default ssd300_vgg16 on GPUs, ssd_tiny on CPUs."""
    epochs: int = 1
    """Of each training."""
    batch_size: int = 16
    """Images a step, of all workers together."""

    def check(self) -> None:
        """Raises UsageError for a value that no sweep can use."""
        lists: dict[str, Sequence[int] | None] = {
            "actors": self.actors,
            "threads": self.threads,
            "workers": self.workers,
        }
        for name, counts in (lists | {"train-actors": self.train_actors}).items():
            if counts is not None and (not counts or min(counts) < 1):
                raise UsageError(
                    f"--{name} is {' '.join(map(str, counts)) or 'empty'}; each number must be at least 1."
                )
        for name, chosen in (("writers", self.writers), ("backends", self.backends)):
            if not chosen:
                raise UsageError(
                    f"--{name} is empty, so there would be nothing to measure. Give one or more."
                )
        if self.repeats < 1:
            raise UsageError(f"--repeats is {self.repeats}; it must be at least 1.")
        self.preprocess(
            Point(kind="preprocess", backend=self.backends[0], actors=1, threads=1)
        ).check()
        if self.train:
            self.training(
                Point(kind="train", backend=self.backends[0], actors=1, threads=1, workers=1),
                storage=self.output,
            ).check()

    @property
    def rows(self) -> int:
        """Images a shard, of all points."""
        most = max((*self.actors, TALKS_ACTORS))
        return self.shard_rows or max(1, self.limit // (SHARDS_AN_ACTOR * most))

    def preprocess(self, point: "Point", *, output: str | None = None) -> Preprocess:
        """The settings of a point's run."""
        names = (
            "input",
            "annotations",
            "recipe",
            "limit",
            "format",
            "quality",
            "seed",
            "read_ms",
            "store_ms",
            "max_reject_fraction",
        )
        return Preprocess(
            **{name: getattr(self, name) for name in names},
            output=output,
            backend=point.backend,
            decoder="own",
            actors=point.actors,
            writers=max(point.writers, 1),
            threads=point.threads,
            shard_rows=self.rows,
        )

    def training(self, point: "Point", *, storage: str) -> training.Settings:
        """The settings of a point's training."""
        on_gpu = point.device == "gpu"
        return training.Settings(
            input=self.train_input or self.input,
            annotations=self.annotations if self.train_input is None else None,
            storage=storage,
            recipe=self.train_recipe,
            backend=point.backend,
            decoder="own",
            limit=self.limit,
            seed=self.seed,
            read_ms=self.read_ms,
            ops_on="device" if point.kind == "ops" else "actors",
            holdout=0.0,
            model=self.model or ("ssd300_vgg16" if on_gpu else "ssd_tiny"),
            epochs=self.epochs,
            batch_size=self.batch_size,
            workers=point.workers,
            gpu=on_gpu,
            cpu=not on_gpu,
            actors=point.actors,
            threads=point.threads,
            shard_rows=self.rows,
            max_reject_fraction=self.max_reject_fraction,
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one measurement is of. `kind`: preprocess, stored (once to Parquet, then read back), train, or ops (train, with the recipe's ops on
    the GPU)."""

    kind: str
    backend: Backend
    actors: int
    threads: int
    writers: int = 0
    workers: int = 0
    device: str = ""
    repeat: int = 0

    def __str__(self) -> str:
        def several(count: int, what: str) -> str:
            return f"{count} {what}{'' if count == 1 else 's'}"

        parts = [self.backend, several(self.actors, "actor")]
        if self.workers:
            parts.append(f"{several(self.workers, 'worker')} on {self.device.upper()}")
        else:
            parts.append(several(self.writers, "writer") if self.writers else "nothing written")
        if self.threads > 1:
            parts.append(several(self.threads, "thread"))
        return ", ".join(parts) + {
            "stored": ", stored once and read back",
            "ops": ", ops on the GPU",
        }.get(self.kind, "")


def _writers(writing: str, actors: int) -> int:
    return {"none": 0, "one": 1, "same": actors}[writing]


def grid(settings: Settings, *, cores: float, gpus: int) -> list[Point]:
    """All points, in the order in which they are measured: repeat by repeat, each in an order of its own, so that what changes on the
    machine meanwhile changes no curve's shape."""
    found: dict[Point, None] = {}
    base = min(settings.threads)
    for backend in settings.backends:
        for actors in settings.actors:
            for writing in settings.writers:
                writers = _writers(writing, actors)
                for threads in settings.threads if writing == "none" else (base,):
                    found[
                        Point(
                            kind="preprocess",
                            backend=backend,
                            actors=actors,
                            writers=writers,
                            threads=threads,
                        )
                    ] = None
        if settings.writers != ("none",):
            few = max((n for n in settings.actors if n <= cores), default=min(settings.actors))
            found[Point(kind="stored", backend=backend, actors=few, writers=few, threads=base)] = (
                None
            )
        if settings.train:
            device = "gpu" if gpus else "cpu"
            several = settings.workers or tuple(range(1, gpus + 1)) or (1, 2)
            if gpus:
                found[
                    Point(
                        kind="ops",
                        backend=backend,
                        actors=1,
                        workers=1,
                        device=device,
                        threads=base,
                    )
                ] = None
            pairs = [(actors, 1) for actors in settings.train_actors] + [
                (1, workers) for workers in several
            ]
            for actors, workers in pairs:
                found[
                    Point(
                        kind="train",
                        backend=backend,
                        actors=actors,
                        workers=workers,
                        device=device,
                        threads=base,
                    )
                ] = None
    ordered = []
    for repeat in range(settings.repeats):
        points = [replace(point, repeat=repeat) for point in found]
        random.Random(f"{settings.seed}/{repeat}").shuffle(points)
        ordered += points
    return ordered


def record(point: Point, report: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    """A report as a row of RESULTS. What was not measured is None.

    Args:
        kind: of the row: that of the point, or store for the first half of one that is stored and read back.
    """
    stages = {stage["name"]: stage for stage in report["stages"]}
    images = report["images_out"] + report["images_rejected"] - report["images_done_before"]
    try:
        _, limit = planner.bound(*planner.of_report(report))
    except ValueError:
        limit = ""
    of_stages = {
        f"{name}_{column}": stages[name][key] if name in stages else None
        for name in STAGES
        for column, key in _OF_STAGE
    }
    return {
        "kind": kind,
        "backend": point.backend,
        "actors": point.actors,
        "writers": 0 if kind == "stored" else point.writers,
        "workers": point.workers,
        "device": point.device,
        "threads": point.threads,
        "repeat": point.repeat,
        "images": images,
        "time_s": report["work_s"],
        "images_per_s": images / report["work_s"] if report["work_s"] else None,
        "cpu_percent": report["work_cpu_percent"],
        "gpu_percent": stages["train"]["gpu_percent"] if "train" in stages else None,
        **of_stages,
        "overhead_cpu_s": report["overhead_cpu_s_per_image"],
        "limit": limit,
        "cores": report["hardware"]["cores"],
        "nodes": report["hardware"]["nodes"],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": report["run_id"],
    }


class Failed(Exception):
    """A point lost images or rejected too many: the message is the run's own."""


def measure(point: Point, settings: Settings) -> list[dict[str, Any]]:
    """Do the run of a point, and return its rows. What it wrote is deleted.

    Raises:
        Failed: it lost images, or rejected too many.
    """
    quiet = Console(quiet=True, force_terminal=False)
    scratch = location.join(settings.output, f"{journal.STATE}/point")
    location.delete_folder(scratch)

    def run(given: Preprocess, kind: str) -> dict[str, Any]:
        outcome = pipeline.run(given, console=quiet)
        if failure := result.verdict_on(outcome, given):
            raise Failed(f"{point}: {failure}")
        assert outcome.report is not None
        return record(point, outcome.report, kind=kind)

    try:
        if point.workers:
            given = settings.training(point, storage=scratch)
            trained = training.run(given, console=quiet)
            if failure := training.verdict_on(trained, given):
                raise Failed(f"{point}: {failure}")
            assert trained.report is not None
            return [record(point, trained.report, kind=point.kind)]
        if point.kind == "stored":
            first = replace(settings.preprocess(point, output=scratch), format="parquet")
            again = replace(first, input=scratch, output=None, annotations=None)
            return [run(first, "store"), run(again, "stored")]
        return [
            run(settings.preprocess(point, output=scratch if point.writers else None), "preprocess")
        ]
    finally:
        location.delete_folder(scratch)


# --- results -------------------------------------------------------------------------------------------------------------


def read_results(output: str) -> list[dict[str, Any]]:
    """The rows of a sweep so far; none if it has none.

    Raises:
        UsageError: what is there is no table of results.
    """
    place = location.join(output, "results.parquet")
    try:
        data = location.read(place)
    except FileNotFoundError:
        return []
    remedy = (
        "It is unknown what was measured. Remove it to measure again, or give another --output."
    )
    return read_table(
        data, RESULTS, f"the table of a sweep's results {place}", remedy=remedy
    ).to_pylist()


def put_results(output: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the rows of a sweep by `rows`, as Parquet and as CSV."""
    table = pa.Table.from_pylist(list(rows), schema=RESULTS)
    for name, put in (("results.parquet", pq.write_table), ("results.csv", pa.csv.write_csv)):
        sink = pa.BufferOutputStream()
        put(table, sink)
        location.write(output, name, memoryview(sink.getvalue()))


def _is_of(row: Mapping[str, Any]) -> Point:
    """The point that a row was measured for."""
    kind = "stored" if row["kind"] == "store" else row["kind"]
    writers = row["actors"] if row["kind"] == "stored" else row["writers"]
    names = ("backend", "actors", "threads", "workers", "device", "repeat")
    return Point(kind=kind, writers=writers, **{name: row[name] for name in names})


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that all rows of an output directory share, as JSON types, with the machine and the versions."""
    names = ("recipe", "limit", "format", "quality", "seed", "read_ms", "store_ms")
    return {
        **{name: _absolute(getattr(settings, name)) for name in ("input", "annotations")},
        **{name: getattr(settings, name) for name in names},
        "shard_rows": settings.rows,
        "machine": {"processor": processor(), "cores": cores_here()},
        "versions": versions(),
    }


def deciding_training(settings: Settings) -> dict[str, Any]:
    """What the rows of training share besides: kept apart, so that training can be measured later."""
    names = ("train_recipe", "model", "epochs", "batch_size")
    return {
        "train_input": _absolute(settings.train_input),
        **{name: getattr(settings, name) for name in names},
    }


def _absolute(place: str | None) -> str | None:
    return place if place is None or place.startswith("demo") else location.absolute(place)


@dataclass(frozen=True, kw_only=True)
class Swept:
    """How a sweep ended: what became of the claims, and which point failed, if one did."""

    findings: list[Finding]
    warning: str = ""  # of what has disturbed the measurements
    failure: str | None = None


RESULT_FILES = ("results.parquet", "results.csv", "sweep.html")


def clear(output: str) -> None:
    """Delete what a sweep has left in `output`."""
    with journal.clearing(output):
        for name in RESULT_FILES:
            location.delete(location.join(output, name))
        location.delete_folder(location.join(output, f"{journal.STATE}/training"))
        location.delete_folder(location.join(output, f"{journal.STATE}/point"))
        location.delete(location.join(output, f"{journal.STATE}/run.json"))


def _parts(settings: Settings) -> dict[str, dict[str, Any]]:
    """What decides the rows, by where it is noted: training apart, so that it can be added later."""
    parts = {settings.output: deciding(settings)}
    if settings.train:
        parts[location.join(settings.output, f"{journal.STATE}/training")] = deciding_training(
            settings
        )
    return parts


def look(settings: Settings) -> tuple[list[dict[str, Any]], bool]:
    """The rows that are measured already with the same settings, and whether what is there is to be deleted. It changes nothing.

    Raises:
        UsageError: the output has rows of other settings, files that are no sweep's, or another driver.
    """
    root = settings.output
    lease.check(root, option="--output")
    clears = not settings.resume or journal.is_clearing(root)
    ours = (
        journal.read_made(root) is not None
        if not clears
        else location.exists(location.join(root, f"{journal.STATE}/run.json"))
    )
    taken = [name for name in RESULT_FILES if location.exists(location.join(root, name))]
    if taken and not ours and not journal.is_clearing(root):
        raise UsageError(
            f"{location.join(root, taken[0])} exists and is no result of an earlier sweep: it would be overwritten. Nothing was measured. "
            f"Give an --output without it."
        )
    if clears:
        return [], True
    there = {
        place: journal.check_settings(place, wanted) for place, wanted in _parts(settings).items()
    }
    return (read_results(root) if there[root] else []), False


def claim(settings: Settings, *, clears: bool) -> None:
    """Delete what is there where that was asked for, and note what decides the rows."""
    if clears:
        clear(settings.output)
    for place, wanted in _parts(settings).items():
        if journal.read_made(place) is None:
            journal.put_made(place, journal.Made(settings=wanted, versions=versions()))


def leave(
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    *,
    gpus: int,
    command: str,
    left_out: Sequence[str] = (),
) -> list[Finding]:
    """Write the table and the page of what was measured so far."""
    where = Where(
        cores=rows[0]["cores"], gpus=gpus, read_ms=settings.read_ms, store_ms=settings.store_ms
    )
    days = sorted({row["at"][:10] for row in rows})
    about = {
        "command": command,
        "date": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "settings": asdict(settings) | {"shard_rows": settings.rows},
        "versions": versions(),
        "hardware": {
            "cores": where.cores,
            "nodes": rows[0]["nodes"],
            "memory_bytes": psutil.virtual_memory().total,
            "processor": processor(),
            "gpus": gpus,
            **({"no_memory_for": list(left_out)} if left_out else {}),
        },
    }
    put_results(settings.output, rows)
    location.write(settings.output, "sweep.html", talk.page(rows, where, about).encode())
    return findings(rows, where)


# --- the sweep -----------------------------------------------------------------------------------------------------------


def run(settings: Settings, *, console: Console) -> Swept:
    """Measure what is not measured yet, and leave the table and the page; of what there is by then also where it breaks off.

    Raises:
        UsageError: the message is for the user; nothing was measured.
        KeyboardInterrupt: what was measured is kept, and the same settings go on.
    """
    settings.check()
    joined = joins()
    largest = settings.preprocess(_largest(settings, joined=joined), output=settings.output)
    check_apart(largest)
    looked = pipeline.plan(replace(largest, output=None))
    for backend in settings.backends:
        backend_module(backend).check(looked.recipe)
    if settings.train:
        training.plan(
            settings.training(
                Point(kind="train", backend="opencv", actors=1, threads=1, workers=1),
                storage=settings.output,
            )
        )
    rows, clears = look(settings)
    command = shlex.join(["python", *sys.argv])
    beside = (
        max(settings.workers or (2,)) if settings.train and not torch.cuda.is_available() else 0
    )
    console.print("Starting Ray ...", highlight=False)
    writing = pipeline.writing(largest, looked.recipe)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(ray_session(largest, after=writing, beside=beside))
        stack.enter_context(together())
        gpus = session.gpus
        points = grid(settings, cores=session.cores, gpus=gpus)
        if joined:
            _check_room(settings, session)
        tell = partial(console.print, markup=False, highlight=False)
        held = stack.enter_context(
            lease.hold(settings.output, run_id="sweep", option="--output", tell=tell)
        )
        claim(settings, clears=clears)
        left_out = (
            []
            if joined
            else [str(point) for point in points if not point.repeat and not _fits(point)]
        )
        if left_out:
            points = [point for point in points if _fits(point)]
            console.print(f"Left out for want of memory: {'; '.join(left_out)}.", highlight=False)
        done = {_is_of(row) for row in rows}
        left = [point for point in points if point not in done]
        if len(left) < len(points):
            console.print(
                f"{len(points) - len(left)} of {len(points)} points are measured already.",
                highlight=False,
            )
        # Once before, so that no point is the one that reads from a cold disk.
        for _ in Reader(threads=8).read(looked.work):
            pass
        failure = None
        try:
            with _progress(console, len(left)) as show:
                for point in left:
                    held.check()
                    fresh = measure(point, settings)
                    rows += fresh
                    put_results(settings.output, rows)
                    show(point, fresh[-1])
        except Failed as error:
            failure = str(error)
        except Untouched as error:  # of the run of one point: the sweep has rows all the same
            raise KeyboardInterrupt from error
        finally:
            found = (
                leave(settings, rows, gpus=gpus, command=command, left_out=left_out) if rows else []
            )
    warning = talk.disturbed(rows, Where(cores=session.cores))
    return Swept(findings=found, warning=warning, failure=failure)


def _largest(settings: Settings, *, joined: bool) -> Point:
    """The point with the most actors, of those that this machine has the memory for; of a cluster that is joined this is not known."""
    counts = [
        (actors, _writers(writing, actors))
        for actors in settings.actors
        for writing in settings.writers
    ]
    counts += [(actors, 0) for actors in settings.train_actors] if settings.train else []
    points = [
        Point(kind="preprocess", backend=backend, actors=actors, writers=also, threads=1)
        for backend in settings.backends
        for actors, also in counts
    ]
    return max(
        (point for point in points if joined or _fits(point)),
        default=min(points, key=_actors),
        key=_actors,
    )


def _actors(point: Point) -> int:
    return point.actors + max(point.writers, 1)  # one is counted where none writes


def _fits(point: Point) -> bool:
    return memory_for([(_actors(point), point.backend)]) <= psutil.virtual_memory().total


def _check_room(settings: Settings, session: Session) -> None:
    most = _largest(settings, joined=True)
    if most.actors + most.writers > session.at_most:
        raise UsageError(
            f"The largest point has {most.actors} actors and {most.writers} writers, but the cluster has {session.at_most} CPUs, one each. "
            f"Nothing was measured. Give smaller --actors, or add nodes first."
        )


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Point, Mapping[str, Any]], None]]:
    """A line for each point, with a bar below it in a terminal, and the time that is left elsewhere."""
    begun = time.perf_counter()
    columns = (
        TextColumn("points"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Points take from seconds to a minute: of the last few alone the estimate would jump.
    with Progress(
        *columns, console=console, speed_estimate_period=1e9, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("points", total=total)
        done = 0

        def show(point: Point, row: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            progress.update(task, completed=done)
            took = (
                "no time known"
                if row["time_s"] is None
                else f"{row['time_s']:.2f} s, {row['images_per_s']:.0f} images/s"
            )
            cpu = "" if row["cpu_percent"] is None else f", CPU {row['cpu_percent']:.0f}%"
            left_s = (time.perf_counter() - begun) / done * (total - done)
            left = (
                ""
                if console.is_terminal
                else f"; {left_s / 60:.0f} min left"
                if left_s >= 60
                else f"; {left_s:.0f} s left"
            )
            console.print(
                f"{done}/{total} {point}: {took}{cpu}{left}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        yield show
