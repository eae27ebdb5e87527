"""The preprocess job: its settings, its plan, and its second stage, which writes."""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from rich.console import Console

from raypipe.data import journal
from raypipe.data.formats.coco import annotations_of, check_annotation_ids, write_annotations
from raypipe.data.formats.files import EXTENSIONS
from raypipe.data.formats.huggingface import holds
from raypipe.data.location import Location
from raypipe.data.parts import Part
from raypipe.data.shapes import Placement, placement
from raypipe.data.sinks import Sink
from raypipe.data.tables import frames_of, unlist
from raypipe.errors import UsageError
from raypipe.images import catalog
from raypipe.images.frames import into_picture
from raypipe.images.header import Reject
from raypipe.images.recipe import Finish, Recipe, check_backend
from raypipe.run import result
from raypipe.run.background import Run
from raypipe.run.job import Job, carry_out, shard_pixels
from raypipe.run.live.control import Control
from raypipe.run.result import Outcome
from raypipe.run.settings import (
    Composed,
    Decoding,
    Running,
    Source,
    check_apart,
    check_counts,
    check_wait,
    recipe_identity,
)
from raypipe.run.todo import Results, Todo, left_to_do, listed_for
from raypipe.stages.stage import Count, Stage
from raypipe.stages.write import Write

_CONTAINERS = (".tar", ".parquet")
_LOSSY = ("jpeg", "webdataset", "huggingface")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What images become, and how they are stored."""

    decides: ClassVar = True

    recipe: str = "coco-300"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    format: Literal["jpeg", "png", "npy", "webdataset", "parquet", "huggingface"] = "jpeg"
    """How results are stored."""
    layout: Literal["nchw", "nhwc"] | None = None
    """Order of the axes of npy files, instead of the recipe's."""
    mlperf_cache: str | None = None
    """Write npy files where MLPerf's inference looks for them: OUTPUT/preprocessed/NAME/NHWC or
    NCHW. NAME is its data set (coco-300 ...)."""
    quality: int = 95
    """JPEG quality of what is written, 1 to 100."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        for name, given in {"layout": self.layout, "mlperf-cache": self.mlperf_cache}.items():
            if given is not None and self.format != "npy":
                raise UsageError(
                    f"--{name} {given} is for --format npy; this run writes {self.format}."
                )
        cache = self.mlperf_cache
        if cache is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", cache):
            raise UsageError(
                f"--mlperf-cache is {cache!r}; it is the name of one of MLPerf's data sets, such "
                f"as coco-300."
            )
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality is {self.quality}; JPEG quality goes from 1 to 100.")

    @property
    def identity(self) -> dict[str, Any]:
        """What an output must agree with, as JSON types."""
        return {
            "recipe": recipe_identity(catalog.get(self.recipe)),
            "format": self.format,
            "layout": self.layout,
            "mlperf_cache": self.mlperf_cache,
            "quality": self.quality if self.format in _LOSSY else None,
        }

    def finish(self, recipe: Recipe) -> Finish | None:
        """The finish of npy files; None: they hold the uint8 pixels unchanged."""
        if self.format != "npy":
            return None
        layouts: dict[str | None, Literal["chw", "hwc"]] = {"nchw": "chw", "nhwc": "hwc"}
        wanted = layouts.get(self.layout)
        if recipe.finish is None:
            return Finish(layout="chw", dtype="uint8") if wanted == "chw" else None
        return replace(recipe.finish, layout=wanted or recipe.finish.layout)


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Where results go, and who writes them."""

    decides: ClassVar = False

    output: str | None = None
    """Folder or URI for results; with several nodes, one that all of them see. Without it nothing
    is written."""
    part: str | None = None
    """K/N: do every N-th shard, from the K-th on. N commands, on any machines, share the output;
    each has a state of its own in it."""
    writers: Count = "auto"
    """Writer actors; 0: preprocess actors write what they made; auto: what the planner finds
    best, of both."""
    store_ms: float = 0.0
    """Milliseconds to add to the writing of each image, as for a slow store."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        check_counts({"writers": self.writers}, least=0)
        check_wait("store-ms", self.store_ms)
        if self.divided is not None and self.output is None:
            raise UsageError(
                f"--part {self.part} is for runs that write: without --output nothing is kept of "
                "a part. Add --output."
            )

    @property
    def divided(self) -> Part | None:
        """The part of the work to do; None: all of it. Raises UsageError."""
        return None if self.part is None else Part.parse(self.part)

    @property
    def root(self) -> Location | None:
        """The output with the state of this run; None: nothing is written."""
        if self.output is None:
            return None
        root = Location.of(self.output)
        return root if self.divided is None else self.divided.state(root)


@dataclass(frozen=True, kw_only=True)
class Settings(Composed):
    """What the preprocess job takes."""

    source: Source
    decoding: Decoding = field(default_factory=Decoding)
    stored: Stored = field(default_factory=Stored)
    writing: Writing = field(default_factory=Writing)
    running: Running = field(default_factory=Running)


def run(
    settings: Settings,
    *,
    consume: Callable[[pa.Table], None] | None = None,
    console: Console | None = None,
    began: Callable[[Control], None] = lambda control: None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Preprocess as `settings` say. Arguments, result and errors are those of `carry_out`."""
    return carry_out(
        lambda: preprocessing(settings),
        source=settings.source.input,
        consume=consume,
        console=console,
        began=began,
        stop=stop,
    )


def start(
    settings: Settings,
    *,
    consume: Callable[[pa.Table], None] | None = None,
    console: Console | None = None,
) -> Run:
    """Start a run in the background; the arguments are those of `run`."""
    return Run(partial(run, settings, consume=consume, console=console))


def preprocessing(settings: Settings) -> Job:
    """Plan the job. Changes nothing.

    Raises:
        UsageError: the settings, the input or the output cannot be used.
    """
    todo = plan(settings)
    then = writing(settings, todo)

    def conclude(written: list[journal.Written]) -> dict[str, Any]:
        annotations, output = settings.source.coco, settings.writing.output
        if annotations is None or output is None or not _annotates(settings):
            return {}
        rows = ((w.image_id, w.file, w.height, w.width, w.boxes, w.annotation_ids) for w in written)
        kept = write_annotations(
            Location.of(annotations),
            Location.of(output),
            rows,
            folder=image_folder(settings),
            placed=dict(_placed(settings.source.seed, todo, written)),
        )
        return {"shapes_dropped": kept.shapes_dropped}

    return Job(
        given=settings.flat,
        running=settings.running,
        reading=settings.running.reading(settings.source.input),
        pixels=settings.decoding.pixels(todo.recipe, seed=settings.source.seed),
        todo=todo,
        then=then,
        conclude=conclude,
    )


def plan(settings: Settings) -> Todo:
    """List the input, less what an earlier run into the same output has done. Changes nothing.

    Raises:
        UsageError: the settings, the input or the output cannot be used.
    """
    settings.check()
    source, output = settings.source, settings.writing.output
    check_apart(output, source.input)
    _check_kept(settings)
    recipe = catalog.get(settings.stored.recipe)
    check_backend(recipe, settings.decoding.backend)
    listed = listed_for(recipe, source, limit=settings.running.limit)
    rows = listed.rows
    check_cache_names(settings, rows)
    annotations: tuple[str, ...] = ()
    if source.coco is not None and _annotates(settings):
        annotations = (annotations_of(Location.of(source.coco)),)
        if output is not None:
            check_annotation_ids(rows, source.coco)
    results = Results(
        root=settings.writing.root,
        decides=settings.decided(),
        names=result_names(settings),
        endings=annotations,
        part=settings.writing.divided,
    )
    return left_to_do(
        recipe,
        rows,
        results,
        decoding=settings.decoding,
        running=settings.running,
        skipped=listed.skipped,
        classes=listed.classes,
    )


def _check_kept(settings: Settings) -> None:
    """Raise UsageError if the images' files would be written without the boxes asked for."""
    source, stored = settings.source, settings.stored
    boxed = source.annotations is not None and source.coco is None
    if boxed and settings.writing.output is not None and stored.format in EXTENSIONS:
        raise UsageError(
            f"--annotations {source.annotations!r} is no COCO JSON, and files of --format "
            f"{stored.format} have no place for its boxes. Nothing was started. Give --format "
            f"parquet, huggingface or webdataset, or leave out --annotations."
        )


def writing(settings: Settings, todo: Todo) -> Stage | None:
    """The stage that writes the preprocessed images; None: nothing is written."""
    if (root := settings.writing.root) is None:
        return None
    stored, backend = settings.stored, settings.decoding.backend
    step = Write(
        sink=Sink(
            format=stored.format,
            root=root,
            folder=image_folder(settings),
            quality=stored.quality,
            keeps_suffix=stored.mlperf_cache is not None,
            holds=holds(todo.work),
            classes=todo.classes,
        ),
        backend=backend,
        finish=stored.finish(todo.recipe),
        wait_ms=settings.writing.store_ms,
        shard_pixels=shard_pixels(todo.left, todo.recipe),
    )
    return Stage(
        steps=(step,),
        actors=settings.writing.writers,
        noun="writers",
        option="writers",
        doing=f"writing {stored.format}",
        share=0.25,
        # Ray Data hands out tasks ten times a second. With two short ones a writer is mostly idle.
        in_flight=4,
        joins=True,
    )


def _annotates(settings: Settings) -> bool:
    """Whether the run writes the COCO JSON of its results. MLPerf's loader takes the original."""
    return settings.source.coco is not None and settings.stored.mlperf_cache is None


def _placed(
    seed: int, todo: Todo, written: Iterable[journal.Written]
) -> Iterator[tuple[str, Placement]]:
    """Compute where the recipe put each image, for the shapes of its annotations.

    Images for which that cannot be computed again are left out.
    """
    rows = todo.work if todo.whole is None else todo.whole
    ids = rows.column("image_id").to_pylist()
    known = zip(unlist(rows.column("boxes")), frames_of(rows).tolist(), strict=True)
    boxes = dict(zip(ids, known, strict=True))
    for image in written:
        if len(image.source) != 2 or image.image_id not in boxes:
            continue
        size = image.source[0], image.source[1]
        of, frame = boxes[image.image_id]
        try:
            of, _ = into_picture(of, (frame[0], frame[1]), size, image.orientation)
            plan = todo.recipe.plan(
                seed=seed, epoch=0, image_id=image.image_id, size=size, boxes=of
            )
            place = placement(plan.ops, size, image.orientation)
        except (Reject, UsageError):
            continue
        same = len(plan.boxes) == len(image.boxes) and np.allclose(
            plan.boxes, image.boxes, atol=0.01
        )
        # Random parameters may depend on the boxes, which may have been moved before.
        if same or not todo.recipe.random:
            yield image.image_id, place


def result_names(settings: Settings) -> tuple[str, ...]:
    """Names of the results, relative to the output (`raypipe.data.outputs.Made`)."""
    stored = settings.stored
    if stored.mlperf_cache is not None:
        return (os.path.join(image_folder(settings), "{name}{suffix}.npy"),)
    if stored.format == "webdataset":
        return ("shard-{shard}.tar",)
    if stored.format == "parquet":
        return ("part-{shard}.parquet",)
    if stored.format == "huggingface":
        return ("train-{shard}.parquet",)
    extension = {"jpeg": ".jpg", "png": ".png", "npy": ".npy"}[stored.format]
    return (os.path.join(image_folder(settings), "{name}" + extension),)


def image_folder(settings: Settings) -> str:
    """Sub-folder of the output for the images.

    With annotations the layout is MLPerf's: the image folder beside annotations/.
    """
    stored, source = settings.stored, settings.source
    if stored.mlperf_cache is not None:
        finish = stored.finish(catalog.get(stored.recipe))
        shape = "NCHW" if finish is not None and finish.layout == "chw" else "NHWC"
        # MLPerf's COCO loader puts this before the JSON's file names; the other loaders do not.
        images = ("val2017",) if stored.mlperf_cache.startswith("coco") else ()
        return "/".join(("preprocessed", stored.mlperf_cache, shape, *images))
    if source.coco is None:
        return ""
    return Location.of(source.input).name


def check_cache_names(settings: Settings, work: pa.Table) -> None:
    """Raise UsageError if a file of --mlperf-cache would not have the name that MLPerf expects."""
    if settings.stored.mlperf_cache is None:
        return
    names, uris = (work.column(column).to_pylist() for column in ("name", "uri"))
    for name, uri in zip(names, uris, strict=True):
        path, suffix = "/" + (place := Location.of(uri)).path, place.suffix
        if suffix.lower() in _CONTAINERS or not path.endswith(f"/{name}{suffix}"):
            raise UsageError(
                f"--mlperf-cache names a file by its image file, and {uri!r} would become "
                f"{name!r}: images of tars and Parquet files have no file of their own, and names "
                f"that are taken or unsafe are changed. Leave out --mlperf-cache, or rename the "
                f"image."
            )


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished run failed: rows lost or unread, or too many rejected. None: it did not."""
    writing = settings.writing
    place = None if writing.root is None else f"{writing.output}/{writing.root.state}"
    return result.verdict_on(outcome, settings.running, place=place)
