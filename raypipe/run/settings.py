"""What a user asks of a run, and what of it cannot be done."""

import math
import os
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pyarrow as pa
import tyro

from raypipe import UsageError
from raypipe.data import location
from raypipe.data.patience import READ_PATIENCE_S
from raypipe.data.reader import Reading
from raypipe.images import catalog
from raypipe.images.decode import MAX_PIXELS
from raypipe.images.recipe import Finish, Recipe, to_json
from raypipe.stages.actor import ACTOR_BYTES

COUNT = int | Literal["auto"]

TRUST = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="MODULE:NAME")]
"""A flag that may be given several times: the user's own code that a file from elsewhere may name."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What jobs/preprocess.py takes. The first group decides the results, the second only how they come about."""

    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT."""
    annotations: str | None = None
    """COCO JSON with the boxes; --input is then the folder its file names are relative to."""
    output: str | None = None
    """Where results go; with several nodes a place that all of them see. Without it nothing is written: preprocessing only."""
    recipe: str = "coco-300"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    backend: Literal["opencv", "torchvision"] = "opencv"
    """Library that decodes and transforms."""
    format: Literal["jpeg", "png", "npy", "webdataset", "parquet"] = "jpeg"
    """How results are stored."""
    layout: Literal["nchw", "nhwc"] | None = None
    """Order of the axes of npy, instead of the recipe's."""
    mlperf_cache: str | None = None
    """Write npy files where MLPerf's inference looks for them: OUTPUT/preprocessed/NAME/NHWC or NCHW, NAME being its data set (coco-300 ...)."""
    quality: int = 95
    """JPEG quality of what is written, 1 to 100."""
    limit: int | None = None
    """Only the first so many images."""
    seed: int = 0
    """Of random augmentations, and of the demo images."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected before they are decoded."""
    actor_memory: float = 2.0
    """GB that a preprocess actor may hold. Shards are cut for it, and an image that alone takes more is rejected."""
    image_seconds: float = 30.0
    """Seconds of CPU that one image may take; more ends its actor, and the image is rejected."""
    decoder: Literal["simplejpeg", "own"] = "simplejpeg"
    """Who decodes JPEGs: simplejpeg, which notices damage; or the backend's own (OpenCV, Pillow), which mostly does not: to compare libraries."""
    damaged: Literal["reject", "keep"] = "reject"
    """Images that a decoder or a checksum says are damaged: reject them, or keep what can be decoded of them."""

    actors: COUNT = "auto"
    """Preprocess actors; auto: as many as the planner finds best, from a shard timed before the start and corrected while it runs."""
    writers: COUNT = "auto"
    """Writer actors; auto: likewise."""
    threads: int = 1
    """Threads that OpenCV or torch may use within each actor."""
    read_ms: float = 0.0
    """Have every image take so many milliseconds longer to read, as from a slow store: to try what waiting does."""
    store_ms: float = 0.0
    """Have every image take so many milliseconds longer to write, likewise."""
    read_patience: float = READ_PATIENCE_S
    """Seconds for which a store that does not answer is asked again; what it has not given by then is left for the next run."""
    shard_rows: int | None = None
    """Images a shard at most, as far as --actor-memory allows; by default as many as make 64 MiB of output."""
    max_reject_fraction: float = 0.01
    """The run fails when more than this share of the images was rejected; results are kept."""
    run_id: str | None = None
    """Name of this run; by default made from the time."""
    resume: bool = True
    """--no-resume deletes the results of earlier runs into --output and starts again."""
    report: str | None = None
    """Folder for report.json and rejects.parquet too; by default only OUTPUT/_raypipe."""

    @property
    def memory(self) -> int:
        """Bytes that a preprocess actor may hold beside its libraries."""
        return int(min(self.actor_memory, 1e9) * 1e9) - ACTOR_BYTES[self.backend]

    def check(self) -> None:
        """Raises UsageError for a value that no run can use."""
        positive = {
            "limit": self.limit,
            "actors": self.actors,
            "writers": self.writers,
            "threads": self.threads,
        }
        positive |= {"shard-rows": self.shard_rows, "max-pixels": self.max_pixels}
        for name, value in positive.items():
            if isinstance(value, int) and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1.")
        for name, delay in (("read-ms", self.read_ms), ("store-ms", self.store_ms)):
            if not 0 <= delay < 3_600_000:
                raise UsageError(
                    f"--{name} is {delay}; it is milliseconds an image, from 0 to an hour's."
                )
        if not 0 <= self.read_patience < 86_400:
            raise UsageError(
                f"--read-patience is {self.read_patience}; it is seconds, from 0 to a day's."
            )
        if not 0 < self.image_seconds < math.inf:
            raise UsageError(
                f"--image-seconds is {self.image_seconds}; it is seconds of CPU, more than 0."
            )
        if not LEAST_MEMORY <= self.memory < 2**50:
            least = (ACTOR_BYTES[self.backend] + LEAST_MEMORY) / 1e9
            raise UsageError(
                f"--actor-memory is {self.actor_memory}; it is GB, and an actor with {self.backend} needs {least:g} at least."
            )
        for name, given in {"layout": self.layout, "mlperf-cache": self.mlperf_cache}.items():
            if given is not None and self.format != "npy":
                raise UsageError(
                    f"--{name} {given} is for --format npy; this run writes {self.format}."
                )
        if self.mlperf_cache is not None and not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.mlperf_cache
        ):
            raise UsageError(
                f"--mlperf-cache is {self.mlperf_cache!r}; it is the name of one of MLPerf's data sets, such as coco-300."
            )
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality is {self.quality}; JPEG quality goes from 1 to 100.")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UsageError(
                f"--max-reject-fraction is {self.max_reject_fraction}; it is a share, from 0 to 1."
            )
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; it must not be negative.")
        if self.run_id is not None and not all(
            c.isalnum() or c in "-_." for c in self.run_id or "/"
        ):
            raise UsageError(
                f"--run-id is {self.run_id!r}; use letters, digits, '-', '_' and '.' only."
            )


def reading(settings: Settings) -> Reading:
    """How preprocess actors read the input."""
    # One reads ahead of the decoder, where reading waits; more only contend for the interpreter, unless each waits for a network.
    local = not location.is_remote(settings.input) and os.path.isdir(
        root := location.local_path(settings.input)
    )
    threads = 8 if location.is_remote(settings.input) else 1
    return Reading(threads=threads, patience_s=settings.read_patience, root=root if local else None)


LEAST_MEMORY = 100_000_000
"""Bytes for images without which an actor is of no use: a few photos and their shard's results."""


def gpu_or_cpu(*, gpu: bool, cpu: bool) -> bool | None:
    """What --gpu and --cpu say of GPUs: they must be taken, must not, or (None) where there are enough. Raises UsageError if both were given."""
    if gpu and cpu:
        raise UsageError(
            "--gpu and --cpu were both given, but a model is on one of them. Leave one out."
        )
    return True if gpu else False if cpu else None


def check_trust(trust: tuple[str, ...]) -> None:
    """Raises UsageError for a --trust that names no attribute of a module."""
    for name in trust:
        if not all(name.partition(":")):
            raise UsageError(
                f"--trust is {name!r}; it is module:name, as the checkpoint writes it, such as mymodels:make."
            )


def deciding(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The settings that decide the results of a run, as JSON types: what an output directory must agree with."""
    quality = settings.quality if settings.format in ("jpeg", "webdataset") else None
    return {
        "input": settings.input
        if settings.input.startswith("demo")
        else location.absolute(settings.input),
        "annotations": settings.annotations and location.absolute(settings.annotations),
        "recipe": {key: value for key, value in to_json(recipe).items() if key != "description"},
        "backend": settings.backend,
        "format": settings.format,
        "layout": settings.layout,
        "mlperf_cache": settings.mlperf_cache,
        "quality": quality,
        "seed": settings.seed,
        "max_pixels": settings.max_pixels,
        "actor_memory": settings.actor_memory,
        "image_seconds": settings.image_seconds,
        "decoder": settings.decoder,
        "damaged": settings.damaged,
    }


def check_apart(settings: Settings) -> None:
    """Raises UsageError where results would overwrite what they are made from, or be taken for input the next time."""
    if settings.output is None or settings.input.startswith("demo"):
        return
    if location.within(settings.output, settings.input):
        raise UsageError(
            f"--output {settings.output!r} is the input folder {settings.input!r} or in it: results would overwrite originals, or be taken "
            f"for input by the next run. Nothing was started. Give a folder beside it."
        )


def result_names(settings: Settings) -> tuple[str, ...]:
    """What the results are called, relative to the output (`raypipe.data.journal.Made`)."""
    one = {"webdataset": "shard-{shard}.tar", "parquet": "part-{shard}.parquet"}.get(
        settings.format
    )
    extension = {"jpeg": ".jpg", "png": ".png", "npy": ".npy"}.get(settings.format)
    if settings.mlperf_cache is not None:
        return (os.path.join(image_folder(settings), "{name}{suffix}.npy"),)
    return (one or os.path.join(image_folder(settings), "{name}" + str(extension)),)


def stored_as(settings: Settings, recipe: Recipe) -> Finish | None:
    """What npy files hold; None: the uint8 pixels as they are."""
    if settings.format != "npy":
        return None
    layout: dict[str | None, Literal["chw", "hwc"]] = {"nchw": "chw", "nhwc": "hwc"}
    wanted = layout.get(settings.layout)
    if recipe.finish is None:
        return Finish(layout="chw", dtype="uint8") if wanted == "chw" else None
    return replace(recipe.finish, layout=wanted or recipe.finish.layout)


def check_cache_names(settings: Settings, work: pa.Table) -> None:
    """Raises UsageError where a file of --mlperf-cache would not have the name by which MLPerf looks for it."""
    if settings.mlperf_cache is None:
        return
    for name, uri in zip(
        work.column("name").to_pylist(), work.column("uri").to_pylist(), strict=True
    ):
        path = location.path_of(uri)
        if location.suffix(uri).lower() in CONTAINERS or not path.endswith(
            f"/{name}{location.suffix(uri)}"
        ):
            raise UsageError(
                f"--mlperf-cache names a file by its image file, and {uri!r} would become {name!r}: images of tars and Parquet files have no file "
                f"of their own, and names that are taken or unsafe are changed. Leave out --mlperf-cache, or rename the image."
            )


CONTAINERS = (".tar", ".parquet")


def check_free(output: str, files: Sequence[str], *, ours: Set[str]) -> None:
    """Raise UsageError where a run would overwrite one of `files`, relative to `output`, that is not one of `ours`."""
    wanted = [file for file in files if file not in ours]
    if not wanted:
        return
    if location.is_remote(output):
        there = set(location.below(output))  # one listing, not a question an image
        taken = [file for file in wanted if file in there]
    elif os.path.isdir(root := location.local_path(output)):
        taken = [file for file in wanted if os.path.lexists(os.path.join(root, file))]
    else:
        taken = []
    if taken:
        raise UsageError(
            f"{location.join(output, taken[0])} exists and is no result of an earlier run: it would be overwritten. Nothing was started. Give an "
            f"--output without it."
        )


def image_folder(settings: Settings) -> str:
    """Sub-folder of the output for the images. With annotations the layout is MLPerf's: the image folder beside annotations/."""
    if settings.mlperf_cache is not None:
        recipe = catalog.get(settings.recipe)
        finish = stored_as(settings, recipe)
        shape = "NCHW" if finish is not None and finish.layout == "chw" else "NHWC"
        # MLPerf's COCO loader puts this before the JSON's file names; the others take these as they are.
        images = ("val2017",) if settings.mlperf_cache.startswith("coco") else ()
        return "/".join(("preprocessed", settings.mlperf_cache, shape, *images))
    return (
        os.path.basename(location.path_of(location.absolute(settings.input)).rstrip("/"))
        if settings.annotations
        else ""
    )
