"""The points of a sweep, and the settings of each one's run."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from raypipe.run import preprocess
from raypipe.run.cluster.sizing import memory_for
from raypipe.sweep.settings import Backend, Settings
from raypipe.train import settings as train


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one measurement is of.

    `kind`: preprocess, fused (without writers: the preprocess actors write), stored (once to
    Parquet, then read back), train, or ops (train, with the recipe's ops on the GPU).
    """

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
        elif self.kind == "fused":
            parts.append("which write themselves")
        else:
            parts.append(several(self.writers, "writer") if self.writers else "nothing written")
        if self.threads > 1:
            parts.append(several(self.threads, "thread"))
        return ", ".join(parts) + {
            "stored": ", stored once and read back",
            "ops": ", ops on the GPU",
        }.get(self.kind, "")


def preprocessing(
    settings: Settings, point: Point, *, output: str | None = None
) -> preprocess.Settings:
    """The settings of a point's run."""
    cells = settings.cells
    return preprocess.Settings.of(
        input=settings.source.input,
        annotations=settings.source.annotations,
        labels=settings.source.labels,
        seed=settings.source.seed,
        recipe=cells.recipe,
        limit=cells.limit,
        format=cells.format,
        quality=cells.quality,
        read_ms=cells.read_ms,
        store_ms=cells.store_ms,
        max_reject_fraction=settings.grid.max_reject_fraction,
        output=output,
        backend=point.backend,
        decoder="own",
        actors=point.actors,
        writers=0 if point.kind == "fused" else max(point.writers, 1),
        threads=point.threads,
        shard_rows=settings.rows,
    )


def training(settings: Settings, point: Point, *, storage: str) -> train.Settings:
    """The settings of a point's training."""
    on_gpu = point.device == "gpu"
    source, wanted = settings.source, settings.training
    return train.Settings.of(
        input=wanted.train_input or source.input,
        annotations=source.annotations if wanted.train_input is None else None,
        seed=source.seed,
        storage=storage,
        recipe=wanted.train_recipe,
        backend=point.backend,
        decoder="own",
        limit=settings.cells.limit,
        read_ms=settings.cells.read_ms,
        ops_on="device" if point.kind == "ops" else "actors",
        holdout=0.0,
        model=wanted.model or ("ssd300_vgg16" if on_gpu else "ssd_tiny"),
        epochs=wanted.epochs,
        batch_size=wanted.batch_size,
        workers=point.workers,
        gpu=on_gpu,
        cpu=not on_gpu,
        actors=point.actors,
        threads=point.threads,
        shard_rows=settings.rows,
        max_reject_fraction=settings.grid.max_reject_fraction,
    )


def check(settings: Settings) -> None:
    """Raise UsageError for a value that no sweep, or none of its runs, can use."""
    settings.check()
    backend = settings.grid.backends[0]
    first = Point(kind="preprocess", backend=backend, actors=1, threads=1)
    preprocessing(settings, first).check()
    if settings.training.train:
        trained = replace(first, kind="train", workers=1)
        training(settings, trained, storage=settings.grid.output).check()


def writers_of(writing: str, actors: int) -> int:
    return {"none": 0, "one": 1, "same": actors, "fused": 0}[writing]


def grid(settings: Settings, *, cores: float, gpus: int) -> list[Point]:
    """All points in the order of measuring: repeat by repeat, each in an order of its own.

    So what changes on the machine meanwhile changes no curve's shape. One point of each kind comes
    first: what is left can be estimated from them (remaining.py).
    """
    found: dict[Point, None] = {}
    for backend in settings.grid.backends:
        points = _preprocessing(settings, backend, cores)
        points += _training(settings, backend, gpus) if settings.training.train else []
        found |= dict.fromkeys(points)
    ordered = []
    for repeat in range(settings.grid.repeats):
        points = [replace(point, repeat=repeat) for point in found]
        random.Random(f"{settings.source.seed}/{repeat}").shuffle(points)
        ordered += points if repeat else _kinds_first(points)
    return ordered


def _kinds_first(points: Sequence[Point]) -> list[Point]:
    first = {point.kind: point for point in reversed(points)}.values()
    ahead = [point for point in points if point in first]
    return ahead + [point for point in points if point not in first]


def _preprocessing(settings: Settings, backend: Backend, cores: float) -> list[Point]:
    base = min(settings.grid.threads)
    points = [
        Point(
            kind="fused" if writing == "fused" else "preprocess",
            backend=backend,
            actors=actors,
            writers=writers_of(writing, actors),
            threads=threads,
        )
        for actors in settings.grid.actors
        for writing in settings.grid.writers
        for threads in (settings.grid.threads if writing == "none" else (base,))
    ]
    if settings.grid.writers != ("none",):
        few = max(
            (n for n in settings.grid.actors if n <= cores), default=min(settings.grid.actors)
        )
        points.append(Point(kind="stored", backend=backend, actors=few, writers=few, threads=base))
    return points


def _training(settings: Settings, backend: Backend, gpus: int) -> list[Point]:
    several = settings.training.workers or tuple(range(1, gpus + 1)) or (1, 2)
    pairs = [(actors, 1) for actors in settings.training.train_actors] + [(1, n) for n in several]
    kinds = [("ops", 1, 1)] if gpus else []
    return [
        Point(
            kind=kind,
            backend=backend,
            actors=actors,
            workers=workers,
            device="gpu" if gpus else "cpu",
            threads=min(settings.grid.threads),
        )
        for kind, actors, workers in [*kinds, *(("train", *pair) for pair in pairs)]
    ]


def largest(settings: Settings, *, joined: bool) -> Point:
    """The point with the most actors, of those that this machine has the memory for.

    Of a cluster that is joined the memory is not known.
    """
    counts = [
        (actors, writers_of(writing, actors))
        for actors in settings.grid.actors
        for writing in settings.grid.writers
    ]
    counts += (
        [(actors, 0) for actors in settings.training.train_actors]
        if settings.training.train
        else []
    )
    points = [
        Point(kind="preprocess", backend=backend, actors=actors, writers=also, threads=1)
        for backend in settings.grid.backends
        for actors, also in counts
    ]
    return max(
        (point for point in points if joined or fits(point)),
        default=min(points, key=_actors),
        key=_actors,
    )


def _actors(point: Point) -> int:
    return point.actors + max(point.writers, 1)  # one is counted where none writes


def fits(point: Point) -> bool:
    return memory_for([(_actors(point), point.backend)]) <= psutil.virtual_memory().total
