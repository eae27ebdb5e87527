"""The predict job: preprocess actors make what the model was trained on, predict actors say what is there.

The recipe is the checkpoint's, without chance: the model sees what it was judged on in training.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from raypipe.data import demo, journal
from raypipe.data.formats.coco import image_key, read_coco
from raypipe.data.formats.parquet import read_table
from raypipe.data.journal import Dropped
from raypipe.data.listing import look
from raypipe.data.location import Location
from raypipe.data.sinks import Sink
from raypipe.data.tables import (
    ANNOTATION_FIELDS,
    PREDICTIONS,
    SOURCE,
    frames_of,
    unlist,
    whole,
)
from raypipe.errors import UsageError, foreign
from raypipe.images import backend as backend_module
from raypipe.images.frames import into_picture, sound
from raypipe.images.header import Reject
from raypipe.images.ops.op import as_op
from raypipe.images.recipe import Recipe, for_evaluation
from raypipe.images.recipe_json import from_json
from raypipe.models import checkpoint as checkpoints
from raypipe.models import evaluate
from raypipe.models.evaluate import Precision, Truth, mean_average_precision
from raypipe.run import result
from raypipe.run.background import Run
from raypipe.run.job import Job, Results, carry_out, left_to_do
from raypipe.run.live.control import Control
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
from raypipe.stages.predict import DRAWN, PART, Predict, Predicting, load
from raypipe.stages.stage import Count, Stage

RESULTS = "predictions.json"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What predicts."""

    decides: ClassVar = True

    checkpoint: str
    """Folder of a checkpoint, or the --storage of a training: then its last one. With several nodes one that
    all of them see."""

    def check(self) -> None:
        """Nothing is wrong with a folder before it is read."""

    @property
    def folder(self) -> str:
        """The checkpoint's own folder. Raises UsageError if there is none."""
        return checkpoints.find(Location.of(self.checkpoint).uri)

    @property
    def identity(self) -> dict[str, Any]:
        """What an output must agree with, as JSON types."""
        return {"checkpoint": checkpoints.identity(self.folder)}


@dataclass(frozen=True, kw_only=True)
class DecodingAsTrained:
    """How images are decoded, and which are not; by default as in the training."""

    decides: ClassVar = True

    backend: Literal["opencv", "torchvision"] | None = None
    """Library that decodes and transforms; by default the one of the training."""
    max_pixels: int | None = None
    """Images with more pixels are rejected before they are decoded; by default as in the training."""
    actor_memory: float = 2.0
    """GB that a preprocess actor may hold. Shards are cut for it; an image that needs more is rejected."""
    image_seconds: float = 30.0
    """Seconds of CPU that one image may take; more ends its actor, and the image is rejected."""
    decoder: Literal["simplejpeg", "own"] | None = None
    """Decoder of JPEGs: simplejpeg, or the backend's own; by default as in the training."""
    damaged: Literal["reject", "keep"] | None = None
    """Images that a decoder or a checksum calls damaged: reject or keep; by default as in the training."""

    def check(self) -> None:
        """Raise UsageError for a value that no run can use."""
        self.after({}).check()

    def after(self, trained: Mapping[str, Any]) -> Decoding:
        """With what the training's settings say, where nothing was given."""
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
    """Boxes with a lower score are left out. Precision is measured on those that stay, and needs weak ones."""
    draw: bool = False
    """Draw the boxes on the images too, as OUTPUT/drawn/NAME.jpg."""
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
    """Where results go: predictions.json, predictions/, and with --draw drawn/; with several nodes a place
    that all of them see."""
    trust: TRUST = ()
    """Code outside raypipe that the checkpoint may name and that is then run, as module:name; may be given
    several times."""
    predictors: Count = "auto"
    """Predict actors, each with the model; auto: one a GPU, or as for --actors."""
    store_ms: float = 0.0
    """Have every image take so many milliseconds longer to predict on."""

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
    """Do what `settings` say, to the end; arguments, result and errors are those of `carry_out`."""
    return carry_out(
        lambda: predicting(settings),
        source=settings.source.input,
        console=console,
        began=began,
        stop=stop,
    )


def start(settings: Settings, *, console: Console | None = None) -> Run:
    """Begin a run in the background."""
    return Run(partial(run, settings, console=console))


def predicting(settings: Settings) -> Job:
    """The job.

    Raises:
        UsageError: the settings, the checkpoint, the input or the output cannot be used. Nothing was changed.
    """
    settings.check()
    given, output = settings.source, settings.predicting.output
    trust = settings.predicting.trust
    folder = settings.model.folder
    trained = checkpoints.load(folder, trusted=trust).settings
    checkpoints.check_trusted(trained, folder, trust)
    with foreign(f"{folder}/about.json, settings", remedy="Use another checkpoint."):
        decoding = settings.decoding.after(trained)
    decoding.check()
    check_apart(output, given.input)
    recipe = _recipe(trained, folder, backend=decoding.backend, trust=trust)
    # What is wrong with the weights is said before anything starts.
    load(folder, torch.device("cpu"), trusted=trust)
    listed = look(
        given.input,
        annotations=given.annotations,
        limit=settings.running.limit,
        seed=given.seed,
    )
    coco = read_coco(Location.of(given.annotations)) if given.annotations is not None else {}
    names = _names(coco) if coco else _demo_names(given.input)
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
        checkpoint=folder,
        recipe=recipe,
        batch_size=settings.found.batch_size,
        min_score=settings.found.min_score,
        draw_score=settings.found.draw_score if settings.found.draw else None,
        names=names,
        trusted=trust,
    )
    source = listed.rows.set_column(0, SOURCE.field("image_id"), todo.image_ids)
    about = {"folder": folder, "model": trained["model"]["name"], **checkpoints.identity(folder)}
    ids = {image_key(image["id"]): image["id"] for image in coco.get("images") or ()}

    def conclude(written: list[journal.Written]) -> dict[str, Any]:
        tables = list(_stored(Location.of(output), written))
        Location.of(output).write(RESULTS, coco_results(tables, ids))
        return _told(truths_of(source, tables), tables, about, names)

    return Job(
        given=settings.changed(**asdict(decoding)).flat,
        running=settings.running,
        reading=settings.running.reading(given.input),
        pixels=decoding.pixels(recipe, seed=given.seed),
        todo=todo,
        then=_stage(settings, what, model=about["model"], step=about["step"]),
        conclude=conclude,
    )


def _stage(settings: Settings, what: Predicting, *, model: str, step: int) -> Stage:
    """The stage that predicts."""
    sink = Sink(format="parquet", root=Location.of(settings.predicting.output))
    return Stage(
        steps=(Predict(sink=sink, predicting=what, wait_ms=settings.predicting.store_ms),),
        actors=settings.predicting.predictors,
        noun="predictors",
        option="predictors",
        doing=f"predicting with {model} of step {step}",
        share=0.75,
        in_flight=2,
        gpu=settings.device.must,
    )


def _told(
    truths: "Truths",
    tables: Sequence[pa.Table],
    about: dict[str, Any],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """What the report says of predictions (schema PREDICTIONS)."""
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
    """What the categories of demo images are called; of others nothing is known."""
    return dict(enumerate(demo.CLASSES, 1)) if input.startswith("demo") else {}


def _names(coco: dict[str, Any]) -> dict[int, str]:
    """What the categories of a COCO JSON are called, by their ids."""
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
    """What the images of `trained` were made with, without chance.

    Raises:
        UsageError: this raypipe, or this backend, has not all of its ops; or one cannot be undone for boxes.
    """
    try:
        with foreign("it", remedy="Use another checkpoint."):
            recipe = for_evaluation(from_json(dict(trained["recipe"]), trusted=trust))
            backend_module(backend).check(recipe)
            for op in recipe.ops:
                as_op(op).back((1, 1))
    except UsageError as error:
        raise UsageError(
            f"The recipe in the checkpoint {folder} cannot be followed: {error}"
        ) from error
    return recipe


def unlabelled(source: pa.Table) -> pa.Table:
    """`source` (schema SOURCE) without what is known of its images: boxes that make no sense are no reason not to predict."""
    for column in ANNOTATION_FIELDS:
        nothing = pa.array([[]] * source.num_rows, column.type)
        source = source.set_column(source.column_names.index(column.name), column, nothing)
    return source


def _stored(output: Location, written: Sequence[journal.Written]) -> Iterator[pa.Table]:
    """The predictions for the images in `written`, a table (schema PREDICTIONS) a shard."""
    wanted = pa.array([row.image_id for row in written], pa.string())
    for part in dict.fromkeys(row.file for row in written):
        place = output / part
        remedy = "--no-resume predicts again."
        table = read_table(place.read(), PREDICTIONS, f"the predictions {place}", remedy=remedy)
        yield table.filter(pc.is_in(table.column("image_id"), wanted))


def coco_results(tables: Sequence[pa.Table], ids: dict[str, Any]) -> bytes:
    """Predictions (schema PREDICTIONS) as COCO's results format, a JSON list of image_id, category_id, bbox (x y width height) and score.

    `ids`: what stands for image ids in the annotations; others stay the text that they are.
    """
    lines = []
    for table in tables:
        found = (unlist(table.column(name)) for name in ("boxes", "labels", "scores"))
        for image_id, boxes, labels, scores in zip(
            table.column("image_id").to_pylist(), *found, strict=True
        ):
            for (x1, y1, x2, y2), label, score in zip(
                boxes.astype(float).tolist(), labels.tolist(), scores.tolist(), strict=True
            ):
                # Four and eight decimals: what float32 holds of a pixel and of a share.
                box = [round(value, 4) for value in (x1, y1, x2 - x1, y2 - y1)]
                one = {
                    "image_id": ids.get(image_id, image_id),
                    "category_id": label,
                    "bbox": box,
                    "score": round(score, 8),
                }
                lines.append(json.dumps(one))
    return ("[" + ",\n".join(lines) + "]\n").encode()


@dataclass(frozen=True, kw_only=True)
class Truths:
    """What is known of the images that were predicted on, in pixels of the pictures as they are shown.

    `by_image`: None where boxes and labels do not fit each other. `dropped`: boxes that cannot be used. `boxes_from`: of how
    many images boxes were drawn in which frame. `strangers`: images whose frame is not recognised; they do not count.
    """

    by_image: dict[str, Truth] | None
    dropped: list[Dropped]
    boxes_from: Counter[str]
    strangers: int


def truths_of(source: pa.Table, tables: Sequence[pa.Table]) -> Truths:
    """What `source` (schema SOURCE) says of the images of `tables` (schema PREDICTIONS)."""
    known = [
        unlist(source.column(name)) for name in ("boxes", "labels", "crowds", "annotation_ids")
    ]
    found = Truths(by_image={}, dropped=[], boxes_from=Counter(), strangers=0)
    if any(len(boxes) != len(labels) for boxes, labels in zip(*known[:2], strict=True)):
        return replace(found, by_image=None)
    rows = dict(
        zip(
            source.column("image_id").to_pylist(),
            zip(frames_of(source).tolist(), *known, strict=True),
            strict=True,
        )
    )
    names = ("image_id", "uri", "height", "width", "orientation")
    for row in (row for table in tables for row in table.select(names).to_pylist()):
        frame, boxes, labels, crowds, ids = rows[row["image_id"]]
        size = row["height"], row["width"]
        try:
            placed, boxes_from = into_picture(boxes, tuple(frame), size, row["orientation"] or 1)
        except Reject:
            found = replace(found, strangers=found.strangers + 1)
            continue
        found.boxes_from.update([boxes_from] if boxes_from else [])
        good, keep, bad = sound(placed, size)
        for at, why in bad:
            identity = int(ids[at]) if len(ids) == len(boxes) else None
            box = boxes[at].tolist()
            found.dropped.append(
                Dropped(
                    image_id=row["image_id"],
                    uri=row["uri"],
                    box=box,
                    annotation_id=identity,
                    reason=why,
                )
            )
        assert found.by_image is not None
        found.by_image[row["image_id"]] = Truth(
            boxes=good, labels=labels[keep], crowds=crowds[keep] if len(crowds) else crowds
        )
    return found


def precision_of(truths: Truths, tables: Sequence[pa.Table]) -> Precision | None:
    """How good predictions (schema PREDICTIONS) are by what is known. Rejected images do not count. None: no image has a labelled box."""
    if truths.by_image is None:
        return None
    of, found = [], []
    for table in tables:
        columns = (unlist(table.column(name)) for name in ("boxes", "labels", "scores"))
        for image_id, boxes, labels, scores in zip(
            table.column("image_id").to_pylist(), *columns, strict=True
        ):
            if image_id in truths.by_image:
                of.append(truths.by_image[image_id])
                found.append(evaluate.Found(boxes=np.asarray(boxes), labels=labels, scores=scores))
    return mean_average_precision(of, found)


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished run counts as failed: rows lost or unread, or too many rejected. None: it does not."""
    return result.verdict_on(outcome, settings.running, output=settings.predicting.output)
