"""A prediction run: preprocess actors make what the model was trained on, predict actors say what is there; it goes on where it was.

Everything but the last stage is preprocessing's (pipeline.py): the table of work, the journal, the pools, the report. The recipe is the
checkpoint's, without chance, so what the model sees is what it was judged on in training.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from raypipe import UsageError
from raypipe.data import demo, journal, location
from raypipe.data.formats.coco import image_key, read_coco
from raypipe.data.formats.parquet import read_table
from raypipe.data.journal import Dropped
from raypipe.data.listing import look
from raypipe.data.patience import READ_PATIENCE_S
from raypipe.data.sinks import Sink
from raypipe.data.tables import ANNOTATION_FIELDS, SOURCE, frames_of, whole
from raypipe.data.work import unlist
from raypipe.errors import foreign
from raypipe.images import backend as backend_module
from raypipe.images.frames import into_picture, sound
from raypipe.images.header import Reject
from raypipe.images.recipe import Recipe, back, for_evaluation, from_json
from raypipe.models import checkpoint as checkpoints
from raypipe.models.evaluate import Found, Precision, Truth, mean_average_precision
from raypipe.run import pipeline, result
from raypipe.run.pipeline import Job, Run, left_to_do
from raypipe.run.result import Outcome
from raypipe.run.settings import COUNT, TRUST, check_apart, check_trust, gpu_or_cpu
from raypipe.run.settings import Settings as Preprocess
from raypipe.stages import After
from raypipe.stages.predict import DRAWN, PART, PREDICTIONS, Predict, Predicting, load

RESULTS = "predictions.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What jobs/predict.py takes. The first group decides the results, the second only how they come about."""

    checkpoint: str
    """Folder of a checkpoint, or the --storage of a training: then its last one. With several nodes one that all of them see."""
    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT."""
    output: str
    """Where results go: predictions.json, predictions/, and with --draw drawn/; with several nodes a place that all of them see."""
    trust: TRUST = ()
    """Code outside raypipe that the checkpoint may name and that is then run, as module:name; may be given several times."""
    annotations: str | None = None
    """COCO JSON: its images, ids and category names; --input is then the folder its file names are relative to."""
    backend: Literal["opencv", "torchvision"] | None = None
    """Library that decodes and transforms; by default the one of the training."""
    limit: int | None = None
    """Only the first so many images."""
    seed: int = 0
    """Which demo images."""
    max_pixels: int | None = None
    """Images with more pixels are rejected before they are decoded; by default those that the training rejected."""
    actor_memory: float = 2.0
    """GB that a preprocess actor may hold. Shards are cut for it, and an image that alone takes more is rejected."""
    image_seconds: float = 30.0
    """Seconds of CPU that one image may take; more ends its actor, and the image is rejected."""
    decoder: Literal["simplejpeg", "own"] | None = None
    """Who decodes JPEGs: simplejpeg, which notices damage, or the backend's own; by default as in the training."""
    damaged: Literal["reject", "keep"] | None = None
    """Images that a decoder or a checksum says are damaged: reject them, or keep what can be decoded of them; by default as in the training."""
    min_score: float = 0.0
    """Boxes with a lower score are left out. Precision is measured on those that stay, and needs the weak ones too."""
    draw: bool = False
    """Draw the boxes on the images too, as OUTPUT/drawn/NAME.jpg."""
    draw_score: float = 0.5
    """Boxes with a lower score are not drawn."""
    batch_size: int = 16
    """Images that the model takes at once."""

    actors: COUNT = "auto"
    """Preprocess actors; auto: as many as the planner finds best, from a few images timed before the start and corrected while it runs."""
    predictors: COUNT = "auto"
    """Predict actors, each with the model; auto: one a GPU, or likewise."""
    gpu: bool = False
    """Predict on GPUs, or fail. By default on GPUs if there are enough."""
    cpu: bool = False
    """Predict on CPUs."""
    threads: int = 1
    """Threads that OpenCV or torch may use within each actor."""
    read_ms: float = 0.0
    """Have every image take so many milliseconds longer to read, as from a slow store: to try what waiting does."""
    store_ms: float = 0.0
    """Have every image take so many milliseconds longer to predict on, likewise."""
    read_patience: float = READ_PATIENCE_S
    """Seconds for which a store that does not answer is asked again; what it has not given by then is left for the next run."""
    shard_rows: int | None = None
    """Images a shard; by default as many as make 64 MiB of pixels."""
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
        positive = {"predictors": self.predictors, "batch-size": self.batch_size}
        for name, value in positive.items():
            if isinstance(value, int) and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1.")
        for name, share in {"min-score": self.min_score, "draw-score": self.draw_score}.items():
            if not 0 <= share <= 1:
                raise UsageError(f"--{name} is {share}; scores go from 0 to 1.")
        gpu_or_cpu(gpu=self.gpu, cpu=self.cpu)
        check_trust(self.trust)
        self.preprocessing.check()

    @property
    def preprocessing(self) -> Preprocess:
        """The input side, as jobs/preprocess.py has it; what is left to the checkpoint, as it is by default."""
        names = (
            *(
                "input",
                "annotations",
                "output",
                "backend",
                "limit",
                "seed",
                "max_pixels",
                "actor_memory",
                "image_seconds",
                "decoder",
                "damaged",
                "actors",
                "threads",
                "read_ms",
                "store_ms",
            ),
            *("shard_rows", "read_patience", "max_reject_fraction", "run_id", "resume", "report"),
        )
        given = {name: getattr(self, name) for name in names}
        return Preprocess(**{name: value for name, value in given.items() if value is not None})


def run(settings: Settings, *, console: Console | None = None, **how: Any) -> Outcome:
    """Do what `settings` say, to the end; `how` (began, stop) and what is raised are those of `pipeline.run`."""
    return pipeline.carry_out(
        lambda: predicting(settings), source=settings.input, console=console, **how
    )


def start(settings: Settings, *, console: Console | None = None) -> Run:
    """Begin a run in the background."""
    return Run(partial(run, settings, console=console))


def predicting(settings: Settings) -> Job:
    """The run of jobs/predict.py.

    Raises:
        UsageError: the settings, the checkpoint, the input or the output cannot be used. Nothing was changed.
    """
    settings.check()
    folder = checkpoints.find(location.absolute(settings.checkpoint))
    trained = checkpoints.load(folder, trusted=settings.trust).settings
    checkpoints.check_trusted(trained, folder, settings.trust)
    with foreign(f"{folder}/about.json, settings", remedy="Use another checkpoint."):
        settings = replace(
            settings,
            backend=settings.backend or trained["backend"],
            max_pixels=settings.max_pixels or whole(trained["max_pixels"]),
            decoder=settings.decoder or trained.get("decoder", "simplejpeg"),
            damaged=settings.damaged or trained.get("damaged", "reject"),
        )
    settings.preprocessing.check()
    check_apart(settings.preprocessing)
    recipe = _recipe(trained, folder, settings)
    load(
        folder, torch.device("cpu"), trusted=settings.trust
    )  # what is wrong with it is said before anything starts
    listed = look(
        settings.input, annotations=settings.annotations, limit=settings.limit, seed=settings.seed
    )
    source = listed.rows
    coco = read_coco(settings.annotations) if settings.annotations is not None else {}
    names = (
        _names(coco)
        if coco
        else dict(enumerate(demo.CLASSES, 1))
        if settings.input.startswith("demo")
        else {}
    )
    what = Predicting(
        checkpoint=folder,
        recipe=recipe,
        batch_size=settings.batch_size,
        min_score=settings.min_score,
        draw_score=settings.draw_score if settings.draw else None,
        names=names,
        trusted=settings.trust,
    )
    identity = checkpoints.identity(folder)
    todo = left_to_do(
        settings.preprocessing,
        recipe,
        unlabelled(source),
        deciding(settings, identity),
        results=(PART, DRAWN) if settings.draw else (PART,),
        endings=(RESULTS,),
        skipped=listed.skipped,
    )
    after = After(
        name="predict",
        noun="predictors",
        doing=f"predicting with {trained['model']['name']} of step {identity['step']}",
        actor=Predict,
        sink=Sink(format="parquet", root=location.absolute(settings.output)),
        arguments={"predicting": what},
        actors=settings.predictors,
        libraries="torchvision",
        share=0.75,
        in_flight=2,
        gpu=gpu_or_cpu(gpu=settings.gpu, cpu=settings.cpu),
    )
    source = source.set_column(0, SOURCE.field("image_id"), todo.image_ids)
    ids = {image_key(image["id"]): image["id"] for image in coco.get("images") or ()}

    def conclude(written: list[journal.Written]) -> dict[str, Any]:
        tables = list(_stored(settings.output, written))
        location.write(settings.output, RESULTS, coco_results(tables, ids))
        truths = truths_of(source, tables)
        precision = precision_of(truths, tables)
        return {
            "dropped": truths.dropped,
            "boxes_from": result.frames_told(truths.boxes_from),
            "predict": {
                "checkpoint": {"folder": folder, "model": trained["model"]["name"], **identity},
                "boxes": sum(
                    pc.sum(pc.list_value_length(table.column("boxes"))).as_py() or 0
                    for table in tables
                ),
                "images_of_another_size": truths.strangers,
                "map": precision and precision.map,
                "map50": precision and precision.map50,
                "map75": precision and precision.map75,
                "map_by_label": precision
                and {
                    names.get(label, str(label)): value
                    for label, value in precision.by_label.items()
                },
            },
        }

    return Job(
        settings=settings.preprocessing,
        given=asdict(settings),
        todo=todo,
        after=after,
        conclude=conclude,
    )


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


def _recipe(trained: dict[str, Any], folder: str, settings: Settings) -> Recipe:
    """What the images of `trained` were made with, without chance.

    Raises:
        UsageError: this raypipe, or this backend, has not all of its ops; or one cannot be undone for boxes.
    """
    try:
        with foreign("it", remedy="Use another checkpoint."):
            recipe = for_evaluation(from_json(dict(trained["recipe"]), trusted=settings.trust))
            backend_module(settings.preprocessing.backend).check(recipe)
            for op in recipe.ops:
                back(op, (1, 1))
    except UsageError as error:
        raise UsageError(
            f"The recipe in the checkpoint {folder} cannot be followed: {error}"
        ) from error
    return recipe


def deciding(settings: Settings, identity: dict[str, Any]) -> dict[str, Any]:
    """What decides the results, as JSON types: what an output directory must agree with. `identity`: of the checkpoint.

    Also the batch size: models that pad images to the largest of a batch see it.
    """
    names = (
        "backend",
        "max_pixels",
        "actor_memory",
        "image_seconds",
        "decoder",
        "damaged",
        "min_score",
        "batch_size",
        "seed",
    )
    return {
        "checkpoint": identity,
        "input": settings.input
        if settings.input.startswith("demo")
        else location.absolute(settings.input),
        "annotations": settings.annotations and location.absolute(settings.annotations),
        "draw": settings.draw_score if settings.draw else None,
        **{name: getattr(settings, name) for name in names},
    }


def unlabelled(source: pa.Table) -> pa.Table:
    """`source` (schema SOURCE) without what is known of its images: boxes that make no sense are no reason not to predict."""
    for field in ANNOTATION_FIELDS:
        nothing = pa.array([[]] * source.num_rows, field.type)
        source = source.set_column(source.column_names.index(field.name), field, nothing)
    return source


def _stored(output: str, written: Sequence[journal.Written]) -> Iterator[pa.Table]:
    """The predictions for the images in `written`, a table (schema PREDICTIONS) a shard."""
    wanted = pa.array([row.image_id for row in written], pa.string())
    for part in dict.fromkeys(row.file for row in written):
        place = location.join(output, part)
        remedy = "--no-resume predicts again."
        table = read_table(
            location.read(place), PREDICTIONS, f"the predictions {place}", remedy=remedy
        )
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
                found.append(Found(boxes=np.asarray(boxes), labels=labels, scores=scores))
    return mean_average_precision(of, found)


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished run counts as failed: rows lost, or too many rejected. None: it does not."""
    return result.verdict_on(outcome, settings.preprocessing)
