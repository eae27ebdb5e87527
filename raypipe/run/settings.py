"""Settings of jobs: groups that the jobs compose, and their flat names.

Each job's Settings hold some of these groups and some of its own. Flags, `settings` in report.json
and the arguments of Python functions have the flat names of the groups' fields. A group either
decides the results of a run as a whole, or only where results go and how they are made.
"""

import math
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import tyro

from raypipe.data.formats.files import root_of
from raypipe.data.lead import REQUESTS_AT_ONCE
from raypipe.data.listing import is_coco
from raypipe.data.location import Location
from raypipe.data.patience import READ_PATIENCE_S
from raypipe.data.reader import Reading
from raypipe.errors import UsageError, did_you_mean
from raypipe.images.header import MAX_PIXELS
from raypipe.images.recipe import Recipe
from raypipe.images.recipe_json import to_json
from raypipe.run.given import typed
from raypipe.stages.actor import ACTOR_BYTES
from raypipe.stages.planning import Preprocessing
from raypipe.stages.stage import Count

TRUST = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="MODULE:NAME")]
"""A flag that may be given several times: the user's own code that a foreign file may name."""

LEAST_MEMORY = 100_000_000
"""Bytes for images that an actor needs at least: a few photos and their shard's results."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which images."""

    decides: ClassVar = True

    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT."""
    annotations: str | None = None
    """Boxes of the images in the folder --input: a COCO JSON, YOLO's data.yaml or folder of text
    files, or Pascal VOC's folder of XML files."""
    labels: Literal["folder"] | None = None
    """folder: the label of an image is the number of its class folder, the first one below --input,
    in alphabetical order."""
    seed: int = 0
    """Seed of demo images and augmentations; in a training also of weights, order and hold-out."""

    @property
    def coco(self) -> str | None:
        """--annotations, if that is a COCO JSON."""
        return self.annotations if is_coco(self.annotations) else None

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; it must not be negative.")

    @property
    def identity(self) -> dict[str, Any]:
        """What an output must agree with, as JSON types."""
        demo = self.input.startswith("demo")
        return {
            "input": self.input if demo else Location.of(self.input).uri,
            "annotations": self.annotations and Location.of(self.annotations).uri,
            "labels": self.labels,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How images are decoded, and which are rejected."""

    decides: ClassVar = True

    backend: Literal["opencv", "torchvision"] = "opencv"
    """Library that decodes and transforms."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected without decoding."""
    actor_memory: float = 2.0
    """GB that a preprocess actor may hold. Shards are cut to fit; larger images are rejected."""
    image_seconds: float = 30.0
    """Seconds of CPU that an image may take. More ends its actor, and the image is rejected."""
    decoder: Literal["simplejpeg", "own"] = "simplejpeg"
    """Decoder of JPEGs: simplejpeg detects damage; the backend's own mostly does not."""
    damaged: Literal["reject", "keep"] = "reject"
    """Images that a decoder or checksum calls damaged: reject, or keep what can be decoded."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        check_counts({"max-pixels": self.max_pixels})
        if not 0 < self.image_seconds < math.inf:
            raise UsageError(
                f"--image-seconds is {self.image_seconds}; it is seconds of CPU, more than 0."
            )
        if not LEAST_MEMORY <= self.memory < 2**50:
            least = (ACTOR_BYTES[self.backend] + LEAST_MEMORY) / 1e9
            raise UsageError(
                f"--actor-memory is {self.actor_memory}; it is GB, and an actor with "
                f"{self.backend} needs {least:g} at least."
            )

    @property
    def memory(self) -> int:
        """Bytes that a preprocess actor may hold beside its libraries."""
        return int(min(self.actor_memory, 1e9) * 1e9) - ACTOR_BYTES[self.backend]

    def pixels(self, recipe: Recipe, *, seed: int, decode_only: bool = False) -> Preprocessing:
        """What preprocess actors do with `recipe`."""
        return Preprocessing(
            recipe=recipe,
            backend=self.backend,
            seed=seed,
            max_pixels=self.max_pixels,
            memory=self.memory,
            image_seconds=self.image_seconds,
            decoder=self.decoder,
            damaged=self.damaged,
            decode_only=decode_only,
        )


@dataclass(frozen=True, kw_only=True)
class Executing:
    """How images are preprocessed. Nothing here decides the results."""

    decides: ClassVar = False

    limit: int | None = None
    """Use only this many images, the first ones."""
    actors: Count = "auto"
    """Preprocess actors; auto: as many as the planner finds best, corrected during the run."""
    threads: int = 1
    """Threads that OpenCV or torch may use within each actor."""
    read_ms: float = 0.0
    """Milliseconds to add to the reading of each image, as for a slow store."""
    read_patience: float = READ_PATIENCE_S
    """Seconds for which a store that does not answer is asked again. Images that it has not given
    by then are left for the next run; a training stops, and goes on from its last checkpoint."""
    shard_rows: int | None = None
    """Images per shard, if --actor-memory allows; by default 64 MiB of pixels."""
    run_id: str | None = None
    """Name of this run; by default made from the time."""
    report: str | None = None
    """Folder for the report. A job with an output or storage has one in _raypipe there too."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        check_counts(
            {
                "limit": self.limit,
                "actors": self.actors,
                "threads": self.threads,
                "shard-rows": self.shard_rows,
            }
        )
        check_wait("read-ms", self.read_ms)
        if not 0 <= self.read_patience < 86_400:
            raise UsageError(
                f"--read-patience is {self.read_patience}; it is seconds, from 0 to a day's."
            )
        if self.run_id is not None and not all(
            c.isalnum() or c in "-_." for c in self.run_id or "/"
        ):
            raise UsageError(
                f"--run-id is {self.run_id!r}; use letters, digits, '-', '_' and '.' only."
            )

    def reading(self, input: str) -> Reading:
        """How preprocess actors read `input`."""
        # One thread reads ahead of the decoder. More would only contend for the interpreter, unless
        # each waits for a network.
        return Reading(
            threads=REQUESTS_AT_ONCE if Location.of(input).is_remote else 1,
            patience_s=self.read_patience,
            root=root_of(input),
        )


@dataclass(frozen=True, kw_only=True)
class Running(Executing):
    """How a job is executed that keeps results. Nothing here decides these."""

    max_reject_fraction: float = 0.01
    """The run fails if a larger share of the images is rejected; results are kept."""
    resume: bool = True
    """Go on from earlier runs. --no-resume deletes what they have left, and starts again."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        super().check()
        if not 0 <= self.max_reject_fraction <= 1:
            raise UsageError(
                f"--max-reject-fraction is {self.max_reject_fraction}; it is a share, from 0 to 1."
            )


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the model computes on."""

    decides: ClassVar = False

    gpu: bool = False
    """Use GPUs, or fail. By default GPUs are used if there are enough."""
    cpu: bool = False
    """Use CPUs."""

    def check(self) -> None:
        """Raise UsageError if both were given."""
        if self.gpu and self.cpu:
            raise UsageError(
                "--gpu and --cpu were both given, but a model is on one of them. Leave one out."
            )

    @property
    def must(self) -> bool | None:
        """Whether GPUs must be used, must not, or (None) are used if there are enough."""
        return True if self.gpu else False if self.cpu else None


# --- checks that groups share ----------------------------------------------------------------


def check_counts(counts: Mapping[str, Count | None], *, least: int = 1) -> None:
    """Raise UsageError for a number below `least`. Keys are flags."""
    for name, value in counts.items():
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}.")


def check_wait(name: str, wait_ms: float) -> None:
    """Raise UsageError for a delay that is negative, or an hour or more."""
    if not 0 <= wait_ms < 3_600_000:
        raise UsageError(
            f"--{name} is {wait_ms}; it is milliseconds an image, from 0 to an hour's."
        )


def check_trust(trust: tuple[str, ...]) -> None:
    """Raise UsageError for a --trust that names no attribute of a module."""
    for name in trust:
        if not all(name.partition(":")):
            raise UsageError(
                f"--trust is {name!r}; it is module:name, as the checkpoint writes it, such as "
                f"mymodels:make."
            )


def check_apart(output: str | None, input: str) -> None:
    """Raise UsageError if results would overwrite the input, or be part of the next run's input."""
    if output is None or input.startswith("demo"):
        return
    if Location.of(output).within(Location.of(input)):
        raise UsageError(
            f"--output {output!r} is the input folder {input!r} or in it: results would overwrite "
            f"originals, or be taken for input by the next run. Nothing was started. Give a folder "
            f"beside it."
        )


def check_free(output: Location, files: Sequence[str], *, ours: Set[str]) -> None:
    """Raise UsageError if one of `files`, relative to `output`, exists and is not one of `ours`."""
    wanted = [file for file in files if file not in ours]
    if not wanted:
        return
    if output.is_remote:
        there = set(output.below())  # one listing instead of a request per image
        taken = [file for file in wanted if file in there]
    elif os.path.isdir(output.path):
        taken = [file for file in wanted if os.path.lexists(os.path.join(output.path, file))]
    else:
        taken = []
    if taken:
        raise UsageError(
            f"{output / taken[0]} exists and is no result of an earlier run: it would be "
            f"overwritten. Nothing was started. Give an --output without it."
        )


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides the results, as JSON types."""
    return {key: value for key, value in to_json(recipe).items() if key != "description"}


# --- groups, composed ------------------------------------------------------------------------

S = TypeVar("S", bound="Composed")


class Composed:
    """Settings of a job: a frozen dataclass of groups, with the flat names of their fields."""

    @classmethod
    def of(cls: type[S], **given: Any) -> S:
        """Compose settings from flat names.

        A path object becomes text. A number of numpy's, or one as text, becomes Python's.

        Raises:
            UsageError: a name is unknown, one without a default is missing, or a value is of a type
                that the setting cannot have.
        """
        unknown = [name for name in given if name not in cls.names()]
        if unknown:
            raise UsageError(
                f"there is no setting {unknown[0]!r}{did_you_mean(unknown[0], cls.names())}"
            )
        groups = {}
        for field, kind in cls.groups().items():
            hints, mine = get_type_hints(kind), {}
            for one in fields(kind):
                name = one.name
                if name in given:
                    mine[name] = typed(name, given[name], hints[name])
                elif one.default is one.default_factory is MISSING:
                    raise UsageError(f"{name} is missing: it has no default, so give {name}=.")
            groups[field] = kind(**mine)
        return cls(**groups)

    @classmethod
    def groups(cls) -> dict[str, type]:
        """The groups, by field."""
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def names(cls) -> list[str]:
        """All flat names."""
        return [name for kind in cls.groups().values() for name in _names(kind)]

    @property
    def flat(self) -> dict[str, Any]:
        """All settings by their flat names."""
        return {name: value for group in self._parts() for name, value in asdict(group).items()}

    def changed(self: S, **given: Any) -> S:
        """The same settings with other values, by flat names."""
        return type(self).of(**{**self.flat, **given})

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        for group in self._parts():
            group.check()

    def decided(self) -> dict[str, Any]:
        """The groups that decide the results, by flat names; for a group with `identity`, that."""
        found: dict[str, Any] = {}
        for group in self._parts():
            if group.decides:
                found |= getattr(group, "identity", None) or asdict(group)
        return found

    def _parts(self) -> list[Any]:
        return [getattr(self, name) for name in self.groups()]


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def parse(
    kind: type[S],
    arguments: list[str] | None,
    *,
    description: str | None,
    prog: str | None = None,
) -> S:
    """Parse a command line: each flag is the flat name of a field.

    Flags that are off by default have no --no- form, and flags that are on have only that.
    """
    return tyro.cli(
        kind,
        args=arguments,
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
