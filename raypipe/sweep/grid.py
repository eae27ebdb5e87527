"""The points of a sweep: its settings, the talk's grid by default, and what they become."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from raypipe import UsageError
from raypipe.run import training
from raypipe.run.session import memory_for
from raypipe.run.settings import Settings as Preprocess

Backend = Literal["opencv", "torchvision"]

TALKS_ACTORS = 20
"""The most of the talk's grid. Shards are cut for so many where a grid has fewer too, so that it
can grow: points with shards of different sizes do not compare."""

SHARDS_AN_ACTOR = 2
"""At the point with the most actors. Each shard costs Ray about 20 ms of CPU, whatever is in it. An
image that takes OpenCV 2.9 ms took an actor 4.9 ms in shards of 12, 4.0 of 25, and 3.4 of 50
(medians of 2, 2 cores of an AMD EPYC, coco-300, 1 actor)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What jobs/sweep.py takes: the talk's grid by default.

    The first group is the same for all points of an output directory.
    """

    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT."""
    output: str
    """Where the results go, and during a measurement what it writes."""
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
    """Have every image take so many milliseconds longer to write, so that writers limit as in the
    talk."""
    shard_rows: int | None = None
    """Images a shard; by default so few that each of 20 actors, or of more, gets 2 shards."""
    max_reject_fraction: float = 0.01
    """The sweep ends as failed when a point rejected more than this share of its images."""

    actors: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 16, 20)
    """Preprocess actors. Points with more than the machine's cores are measured, and marked."""
    writers: tuple[Literal["none", "one", "same"], ...] = ("none", "one", "same")
    """Writer actors: none, one, as many as preprocess actors."""
    backends: tuple[Backend, ...] = ("opencv", "torchvision")
    """Libraries that decode, transform and encode. Each decodes JPEGs with its own decoder."""
    threads: tuple[int, ...] = (1,)
    """Threads of OpenCV or torch within an actor. With several, only the fewest has writers."""
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
    """Training workers beside one preprocess actor; by default 1 to all GPUs; on CPUs 1 and 2."""
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
                    f"--{name} is {' '.join(map(str, counts)) or 'empty'}; "
                    "each number must be at least 1."
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
    """What one measurement is of.

    `kind`: preprocess, stored (once to Parquet, then read back), train, or ops (train, with the
    recipe's ops on the GPU).
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
        else:
            parts.append(several(self.writers, "writer") if self.writers else "nothing written")
        if self.threads > 1:
            parts.append(several(self.threads, "thread"))
        return ", ".join(parts) + {
            "stored": ", stored once and read back",
            "ops": ", ops on the GPU",
        }.get(self.kind, "")


def writers_of(writing: str, actors: int) -> int:
    return {"none": 0, "one": 1, "same": actors}[writing]


def grid(settings: Settings, *, cores: float, gpus: int) -> list[Point]:
    """All points in the order of measuring: repeat by repeat, each in an order of its own.

    So what changes on the machine meanwhile changes no curve's shape. One point of each kind comes
    first: what is left can be estimated from them (remaining.py).
    """
    found: dict[Point, None] = {}
    for backend in settings.backends:
        points = _preprocessing(settings, backend, cores)
        points += _training(settings, backend, gpus) if settings.train else []
        found |= dict.fromkeys(points)
    ordered = []
    for repeat in range(settings.repeats):
        points = [replace(point, repeat=repeat) for point in found]
        random.Random(f"{settings.seed}/{repeat}").shuffle(points)
        ordered += points if repeat else _kinds_first(points)
    return ordered


def _kinds_first(points: Sequence[Point]) -> list[Point]:
    first = {point.kind: point for point in reversed(points)}.values()
    ahead = [point for point in points if point in first]
    return ahead + [point for point in points if point not in first]


def _preprocessing(settings: Settings, backend: Backend, cores: float) -> list[Point]:
    base = min(settings.threads)
    points = [
        Point(
            kind="preprocess",
            backend=backend,
            actors=actors,
            writers=writers_of(writing, actors),
            threads=threads,
        )
        for actors in settings.actors
        for writing in settings.writers
        for threads in (settings.threads if writing == "none" else (base,))
    ]
    if settings.writers != ("none",):
        few = max((n for n in settings.actors if n <= cores), default=min(settings.actors))
        points.append(Point(kind="stored", backend=backend, actors=few, writers=few, threads=base))
    return points


def _training(settings: Settings, backend: Backend, gpus: int) -> list[Point]:
    several = settings.workers or tuple(range(1, gpus + 1)) or (1, 2)
    pairs = [(actors, 1) for actors in settings.train_actors] + [(1, n) for n in several]
    kinds = [("ops", 1, 1)] if gpus else []
    return [
        Point(
            kind=kind,
            backend=backend,
            actors=actors,
            workers=workers,
            device="gpu" if gpus else "cpu",
            threads=min(settings.threads),
        )
        for kind, actors, workers in [*kinds, *(("train", *pair) for pair in pairs)]
    ]


def largest(settings: Settings, *, joined: bool) -> Point:
    """The point with the most actors, of those that this machine has the memory for.

    Of a cluster that is joined the memory is not known.
    """
    counts = [
        (actors, writers_of(writing, actors))
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
        (point for point in points if joined or fits(point)),
        default=min(points, key=_actors),
        key=_actors,
    )


def _actors(point: Point) -> int:
    return point.actors + max(point.writers, 1)  # one is counted where none writes


def fits(point: Point) -> bool:
    return memory_for([(_actors(point), point.backend)]) <= psutil.virtual_memory().total
