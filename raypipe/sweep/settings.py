"""What the sweep job takes: the talk's grid by default."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from raypipe.data.location import Location
from raypipe.errors import UsageError
from raypipe.run.settings import Composed, Source, check_counts

Backend = Literal["opencv", "torchvision"]

TALKS_ACTORS = 20
"""The most actors of the talk's grid. Shards are cut for at least as many, so that a grid can grow.
Points with shards of different sizes cannot be compared."""

SHARDS_AN_ACTOR = 2
"""At the point with the most actors. Each shard costs Ray about 20 ms of CPU, whatever is in it.

OpenCV alone takes 2.9 ms an image. An actor took 4.9 ms in shards of 12 images, 4.0 ms in shards of
25, and 3.4 ms in shards of 50. (coco-300, 1 actor, 2 cores of an AMD EPYC, medians of 2.)"""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What is the same for all points of an output directory."""

    decides: ClassVar = True

    recipe: str = "coco-300"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    limit: int = 1000
    """Images a point."""
    format: Literal["jpeg", "png", "npy", "webdataset", "parquet"] = "jpeg"
    """How writers store."""
    quality: int = 95
    """JPEG quality of what is written, 1 to 100, the same for both backends."""
    read_ms: float = 0.0
    """Have every image take so many milliseconds longer to read, as from a slow store."""
    store_ms: float = 0.0
    """Have every image take so many milliseconds longer to write, so that writers limit as in the
    talk."""
    shard_rows: int | None = None
    """Images a shard; by default so few that each of 20 actors, or of more, gets 2 shards."""

    def check(self) -> None:
        """Raise UsageError for a value that no sweep can use; points check the rest."""
        check_counts({"limit": self.limit})


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which points are measured, and where the results go."""

    decides: ClassVar = False

    output: str
    """Where the results go, and during a measurement what it writes."""
    actors: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 16, 20)
    """Preprocess actors. Points with more than the machine's cores are measured, and marked."""
    writers: tuple[Literal["none", "one", "same", "fused"], ...] = ("none", "one", "same")
    """Writer actors: none, one, as many as preprocess actors; fused: these write themselves."""
    backends: tuple[Backend, ...] = ("opencv", "torchvision")
    """Libraries that decode, transform and encode. Each decodes JPEGs with its own decoder."""
    threads: tuple[int, ...] = (1,)
    """Threads of OpenCV or torch within an actor. With several, only the fewest has writers."""
    repeats: int = 3
    """How often each point is measured; medians are shown."""
    resume: bool = True
    """--no-resume deletes what was measured into --output and starts again."""
    max_reject_fraction: float = 0.01
    """The sweep ends as failed when a point rejected more than this share of its images."""

    def check(self) -> None:
        """Raise UsageError for a value that no sweep can use."""
        _check_lists({"actors": self.actors, "threads": self.threads})
        check_counts({"repeats": self.repeats})
        for name, chosen in (("writers", self.writers), ("backends", self.backends)):
            if not chosen:
                raise UsageError(
                    f"--{name} is empty, so there would be nothing to measure. Give one or more."
                )

    @property
    def root(self) -> Location:
        """Where the results go."""
        return Location.of(self.output)


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """The trainings that are measured."""

    decides: ClassVar = False  # they are noted apart (`decided_of_training`)

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
        """Raise UsageError for a value that no sweep can use."""
        _check_lists({"train-actors": self.train_actors, "workers": self.workers})

    def decided(self) -> dict[str, Any]:
        """What the rows of training share. Kept apart: training can be measured later."""
        place = self.train_input
        demo = place is None or place.startswith("demo")
        return {
            "train_input": place if demo else Location.of(str(place)).uri,
            "train_recipe": self.train_recipe,
            "model": self.model,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, kw_only=True)
class Settings(Composed):
    """What the sweep job takes."""

    source: Source
    grid: Grid
    cells: Cells = field(default_factory=Cells)
    training: Trainings = field(default_factory=Trainings)

    @property
    def rows(self) -> int:
        """Images a shard, of all points."""
        most = max((*self.grid.actors, TALKS_ACTORS))
        return self.cells.shard_rows or max(1, self.cells.limit // (SHARDS_AN_ACTOR * most))


def _check_lists(lists: dict[str, Sequence[int] | None]) -> None:
    for name, counts in lists.items():
        if counts is not None and (not counts or min(counts) < 1):
            raise UsageError(
                f"--{name} is {' '.join(map(str, counts)) or 'empty'}; "
                "each number must be at least 1."
            )
