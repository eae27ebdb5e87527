"""The predict job: preprocess actors make the model's input, and predict actors run the model.

The recipe is the checkpoint's without randomness, by which the model was judged in training.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from raypipe.data import demo, journal
from raypipe.data.formats.coco import image_key, read_coco
from raypipe.data.listing import look
from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.data.sinks import Sink
from raypipe.data.tables import ANNOTATION_FIELDS, SOURCE, whole
from raypipe.errors import UsageError, foreign
from raypipe.images.ops.op import as_op
from raypipe.images.recipe import Recipe, check_backend, for_evaluation
from raypipe.images.recipe_json import from_json
from raypipe.models import checkpoint as checkpoints
from raypipe.run import result
from raypipe.run.background import Run
from raypipe.run.job import Job, carry_out
from raypipe.run.live.control import Control
from raypipe.run.predictions import Truths, coco_results, precision_of, stored, truths_of
from raypipe.run.result import Outcome
from raypipe.run.settings import (
    TRUST,
    Composed,
    Decoding,
    Device,
    Running,
    Source,
    check_apart,
    check_counts,
    check_trust,
    check_wait,
)
from raypipe.run.todo import Results, left_to_do
from raypipe.stages.predict import DRAWN, PART, Predict, Predicting, load
from raypipe.stages.stage import Count, Stage

RESULTS = "predictions.json"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What predicts."""

    decides: ClassVar = True

    checkpoint: str
    """Folder of a checkpoint, or the --storage of a training for its last one; with several nodes,
    one that all of them see."""

    def check(self) -> None:
        """Do nothing: a folder is checked when it is read."""

    @property
    def folder(self) -> str:
        """The folder of the checkpoint itself. Raises UsageError if there is none."""
        return checkpoints.find(Location.of(self.checkpoint).uri)

    @property
    def identity(self) -> dict[str, Any]:
        """What an output must agree with, as JSON types."""
        return {"checkpoint": checkpoints.identity(self.folder)}


@dataclass(frozen=True, kw_only=True)
class DecodingAsTrained:
    """How images are decoded, and which are rejected; by default as in the training."""

    decides: ClassVar = True

    backend: Literal["opencv", "torchvision"] | None = None
    """Library that decodes and transforms; by default the one of the training."""
    max_pixels: int | None = None
    """Images with more pixels are rejected without decoding; by default as in the training."""
    actor_memory: float = 2.0
    """GB that a preprocess actor may hold. Shards are cut to fit; larger images are rejected."""
    image_seconds: float = 30.0
    """Seconds of CPU that an image may take. More ends its actor, and the image is rejected."""
    decoder: Literal["simplejpeg", "own"] | None = None
    """Decoder of JPEGs: simplejpeg, or the backend's own; by default as in the training."""
    damaged: Literal["reject", "keep"] | None = None
    """Images that a decoder or checksum calls damaged: reject or keep; by default as trained."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        self.after({}).check()

    def after(self, trained: Mapping[str, Any]) -> Decoding:
        """Fill in what was not given from the training's settings."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        there = {name: trained[name] for name in self._AS_TRAINED if name in trained}
        if "max_pixels" in there:
            there["max_pixels"] = whole(there["max_pixels"])
        return Decoding(**{**there, **given})

    _AS_TRAINED: ClassVar = ("backend", "max_pixels", "decoder", "damaged")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is kept of what the model finds."""

    decides: ClassVar = True

    min_score: float = 0.0
    """Boxes with a lower score are left out. Precision is measured on the rest; keep weak ones."""
    draw: bool = False
    """Also draw the boxes on the images, as OUTPUT/drawn/NAME.jpg."""
    draw_score: float = 0.5
    """Boxes with a lower score are not drawn."""
    batch_size: int = 16
    """Images that the model takes at once."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        check_counts({"batch-size": self.batch_size})
        for name, share in {"min-score": self.min_score, "draw-score": self.draw_score}.items():
            if not 0 <= share <= 1:
                raise UsageError(f"--{name} is {share}; scores go from 0 to 1.")

    @property
    def identity(self) -> dict[str, Any]:
        """What an output must agree with, as JSON types.

        The batch size is in it: models that pad images to the largest of a batch see it.
        """
        draw = self.draw_score if self.draw else None
        return {"min_score": self.min_score, "draw": draw, "batch_size": self.batch_size}


@dataclass(frozen=True, kw_only=True)
class Predictors:
    """Where results go, and who predicts."""

    decides: ClassVar = False

    output: str
    """Folder or URI for predictions.json, predictions/, and with --draw drawn/; with several nodes,
    one that all of them see."""
    trust: TRUST = ()
    """Code outside raypipe that the checkpoint may name, and that then runs, as module:name; may be
    given several times."""
    predictors: Count = "auto"
    """Predict actors, each with the model; auto: one a GPU, or as for --actors."""
    store_ms: float = 0.0
    """Milliseconds to add to the prediction of each image."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        check_counts({"predictors": self.predictors})
        check_wait("store-ms", self.store_ms)
        check_trust(self.trust)


@dataclass(frozen=True, kw_only=True)
class Settings(Composed):
    """What the predict job takes."""

    model: Model
    source: Source
    predicting: Predictors
    decoding: DecodingAsTrained = field(default_factory=DecodingAsTrained)
    found: Found = field(default_factory=Found)
    device: Device = field(default_factory=Device)
    running: Running = field(default_factory=Running)


def run(
    settings: Settings,
    *,
    console: Console | None = None,
    began: Callable[[Control], None] = lambda control: None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Predict as `settings` say. Arguments, result and errors are those of `carry_out`."""
    return carry_out(
        lambda: predicting(settings),
        source=settings.source.input,
        console=console,
        began=began,
        stop=stop,
    )


def start(settings: Settings, *, console: Console | None = None) -> Run:
    """Start a run in the background."""
    return Run(partial(run, settings, console=console))


def predicting(settings: Settings) -> Job:
    """Plan the job. Changes nothing.

    Raises:
        UsageError: the settings, the checkpoint, the input or the output cannot be used.
    """
    settings.check()
    given, output = settings.source, settings.predicting.output
    check_apart(output, given.input)
    trained = _trained(settings)
    recipe, decoding = trained.recipe, trained.decoding
    listed = look(
        given.input,
        annotations=given.annotations,
        labels=given.labels,
        limit=settings.running.limit,
        seed=given.seed,
    )
    coco = read_coco(Location.of(given.coco)) if given.coco is not None else {}
    names = _names(coco) if coco else dict(enumerate(listed.classes)) or _demo_names(given.input)
    results = Results(
        root=Location.of(output),
        decides={**settings.decided(), **asdict(decoding)},
        names=(PART, DRAWN) if settings.found.draw else (PART,),
        endings=(RESULTS,),
    )
    todo = left_to_do(
        recipe,
        unlabelled(listed.rows),
        results,
        decoding=decoding,
        running=settings.running,
        skipped=listed.skipped,
    )
    what = Predicting(
        checkpoint=trained.folder,
        recipe=recipe,
        batch_size=settings.found.batch_size,
        min_score=settings.found.min_score,
        draw_score=settings.found.draw_score if settings.found.draw else None,
        names=names,
        trusted=settings.predicting.trust,
        memory=decoding.memory,
    )
    source = listed.rows.set_column(0, SOURCE.field("image_id"), todo.image_ids)
    identity = checkpoints.identity(trained.folder)
    about = {"folder": trained.folder, "model": trained.model, **identity}
    ids = {image_key(image["id"]): image["id"] for image in coco.get("images") or ()}

    def conclude(written: list[journal.Written]) -> dict[str, Any]:
        tables = list(stored(Location.of(output), written))
        Location.of(output).write(RESULTS, coco_results(tables, ids))
        return _told(truths_of(source, tables), tables, about, names)

    return Job(
        given=settings.changed(**asdict(decoding)).flat,
        running=settings.running,
        reading=settings.running.reading(given.input),
        pixels=decoding.pixels(recipe, seed=given.seed),
        todo=todo,
        then=_stage(settings, what, model=trained.model, step=identity["step"]),
        conclude=conclude,
    )


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A checkpoint, and how its images were made.

    model: its name.
    recipe: the training's, without randomness.
    """

    folder: str
    model: str
    decoding: Decoding
    recipe: Recipe


def _trained(settings: Settings) -> _Trained:
    """Read and check the checkpoint. Errors in it are found before anything starts.

    Raises:
        UsageError: it cannot be used.
    """
    trust, folder = settings.predicting.trust, settings.model.folder
    trained = checkpoints.load(folder, trusted=trust).settings
    checkpoints.check_trusted(trained, folder, trust)
    with foreign(f"{folder}/about.json, settings", remedy="Use another checkpoint."):
        decoding = settings.decoding.after(trained)
    decoding.check()
    recipe = _recipe(trained, folder, backend=decoding.backend, trust=trust)
    load(folder, torch.device("cpu"), trusted=trust)
    return _Trained(folder=folder, model=trained["model"]["name"], decoding=decoding, recipe=recipe)


def _stage(settings: Settings, what: Predicting, *, model: str, step: int) -> Stage:
    """The stage that predicts."""
    sink = Sink(format="parquet", root=Location.of(settings.predicting.output))
    return Stage(
        steps=(
            Predict(
                sink=sink,
                predicting=what,
                reading=settings.running.reading(settings.source.input),
                wait_ms=settings.predicting.store_ms,
            ),
        ),
        actors=settings.predicting.predictors,
        noun="predictors",
        option="predictors",
        doing=f"predicting with {model} of step {step}",
        share=0.75,
        in_flight=2,
        gpu=settings.device.must,
    )


def _told(
    truths: Truths,
    tables: Sequence[pa.Table],
    about: dict[str, Any],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """The report's figures of predictions (schema PREDICTIONS)."""
    precision = precision_of(truths, tables)
    boxes = (pc.sum(pc.list_value_length(table.column("boxes"))).as_py() for table in tables)
    by_label = precision and {
        names.get(label, str(label)): value for label, value in precision.by_label.items()
    }
    return {
        "dropped": truths.dropped,
        "boxes_from": result.frames_told(truths.boxes_from),
        "predict": {
            "checkpoint": about,
            "boxes": sum(count or 0 for count in boxes),
            "images_of_another_size": truths.strangers,
            "map": precision and precision.map,
            "map50": precision and precision.map50,
            "map75": precision and precision.map75,
            "map_by_label": by_label,
        },
    }


def _demo_names(input: str) -> dict[int, str]:
    """Names of the categories of demo images, by id. Others have none."""
    return dict(enumerate(demo.CLASSES, 1)) if input.startswith("demo") else {}


def _names(coco: dict[str, Any]) -> dict[int, str]:
    """Names of the categories of a COCO JSON, by id."""
    with foreign(
        "the categories of the annotations", remedy="Each needs an id, a whole number, and a name."
    ):
        categories = (
            category for category in coco.get("categories") or () if isinstance(category, dict)
        )
        return {
            whole(category["id"]): str(category["name"])
            for category in categories
            if {"id", "name"} <= category.keys()
        }


def _recipe(
    trained: dict[str, Any], folder: str, *, backend: str, trust: tuple[str, ...]
) -> Recipe:
    """The recipe of a training, without randomness.

    Raises:
        UsageError: this raypipe or this backend lacks one of its ops, or an op cannot be undone for
            boxes.
    """
    try:
        with foreign("it", remedy="Use another checkpoint."):
            recipe = for_evaluation(from_json(dict(trained["recipe"]), trusted=trust))
            check_backend(recipe, backend)
            for op in recipe.ops:
                as_op(op).back((1, 1))
    except UsageError as error:
        raise UsageError(
            f"The recipe in the checkpoint {folder} cannot be used: {error}"
        ) from error
    return recipe


def unlabelled(source: pa.Table) -> pa.Table:
    """Clear the annotations of `source` (schema SOURCE): wrong boxes must not reject images."""
    for column in ANNOTATION_FIELDS:
        nothing = pa.array([[]] * source.num_rows, column.type)
        source = source.set_column(source.column_names.index(column.name), column, nothing)
    return source


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished run failed: rows lost or unread, or too many rejected. None: it did not."""
    place = f"{settings.predicting.output}/{STATE}"
    return result.verdict_on(outcome, settings.running, place=place)
