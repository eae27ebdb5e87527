"""What a training has to do: all epochs' rows in one table, shuffled, and the rows to judge on."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data import sizes
from raypipe.data.listing import list_images, look
from raypipe.data.tables import Listed, unlist
from raypipe.data.work import make_work, wanted_by
from raypipe.errors import UsageError
from raypipe.images import backend as backend_module
from raypipe.images import catalog
from raypipe.images.recipe import Finish, Recipe, for_evaluation
from raypipe.models import detection
from raypipe.models.detection import Classes
from raypipe.run.settings import recipe_identity
from raypipe.stages.preprocess import Preprocessing
from raypipe.train.settings import Learning, Model, Settings


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train, as a worker needs it. `rows`: of all epochs. `left`: a recipe whose ops the workers do on their devices."""

    learning: Learning
    model: Model
    classes: Classes
    finish: Finish
    rows: int
    left: Recipe | None = None
    seed: int = 0
    threads: int = 1
    compile: bool = False
    checkpoint_every: int | None = None
    trust: tuple[str, ...] = ()  # classes of the user's own that a checkpoint may hold


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a training has to do.

    work: the rows of all epochs. holdout: those that it is judged on (schema WORK).
    deciding: what decides the weights, JSON types; a checkpoint of other settings is refused.
    skipped: what the listing left out, by suffix.
    shard_bytes: memory that an actor takes for the largest shard, as far as known.
    """

    recipe: Recipe
    work: pa.Table
    holdout: pa.Table
    training: Training
    pixels: Preprocessing
    deciding: dict[str, Any]
    skipped: dict[str, int]
    shard_bytes: int = 0


def plan(settings: Settings) -> Todo:
    """List the input, and decide what is trained on in which order.

    Raises:
        UsageError: the settings, the model or the input cannot be used. Nothing was changed.
    """
    settings.check()
    seed, learning, decoding = settings.source.seed, settings.learning, settings.decoding
    recipe = catalog.get(learning.recipe)
    on_device = learning.ops_on == "device"
    backend_module("torchvision" if on_device else decoding.backend).check(recipe)
    backend_module(decoding.backend).check(for_evaluation(recipe))  # makes what is judged on
    detection.check(settings.model.model, recipe.fixed_size)
    found, listed, held = _listed(settings)
    source = wanted_by(listed, needs_boxes=recipe.needs_boxes, drops_crowds=recipe.drops_crowds)
    classes = Classes.among(unlist(source.column("labels")))
    check_learnable(source, listed, settings.source.input)
    shape = partial(
        sizes.cut,
        images=source.num_rows,
        rows=settings.running.shard_rows,
        scratch=backend_module(decoding.backend).SCRATCH,
        memory=decoding.memory,
        max_pixels=decoding.max_pixels,
    )
    cut = shape(replace(recipe, ops=()) if on_device else recipe)
    work = make_work(source, **cut.arguments, epochs=learning.epochs, shuffle_seed=seed)
    workers = settings.training
    return Todo(
        recipe=recipe,
        work=work,
        holdout=make_work(held, **shape(for_evaluation(recipe)).arguments),
        training=Training(
            learning=learning,
            model=settings.model,
            classes=classes,
            finish=detection.finish_of(recipe),
            rows=work.num_rows,
            left=recipe if on_device else None,
            seed=seed,
            threads=workers.worker_threads,
            compile=workers.compile,
            checkpoint_every=workers.checkpoint_every,
            trust=workers.trust,
        ),
        pixels=decoding.pixels(recipe, seed=seed, decode_only=on_device),
        deciding={
            **settings.decided(),
            "recipe": recipe_identity(recipe),
            "images": _told_apart(source),
            "holdout": _told_apart(held),
            "classes": list(classes.ids),
        },
        skipped=dict(found.skipped),
        shard_bytes=cut.need,
    )


def _listed(settings: Settings) -> tuple[Listed, pa.Table, pa.Table]:
    """What the listing found, the rows to train on, and the rows to judge on (schema SOURCE)."""
    source, holdout = settings.source, settings.holdout
    found = look(
        source.input,
        annotations=source.annotations,
        limit=settings.running.limit,
        seed=source.seed,
    )
    if holdout.holdout_input is None:
        return found, *split(found.rows, share=holdout.holdout, seed=source.seed)
    held = list_images(
        holdout.holdout_input, annotations=holdout.holdout_annotations, seed=source.seed
    )
    return found, found.rows, held


def split(source: pa.Table, *, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Take a random share of the rows out of `source`: the others, and these, each in its order.

    It is a function of the seed and the number of rows.
    """
    held = np.zeros(source.num_rows, bool)
    count = round(share * source.num_rows)
    held[np.random.default_rng([seed, 0x401D]).permutation(source.num_rows)[:count]] = True
    return source.filter(pa.array(~held)), source.filter(pa.array(held))


def _told_apart(source: pa.Table) -> dict[str, Any]:
    """What tells one list of images from another: their number, and a digest of their ids in order."""
    ids = "\n".join(source.column("image_id").to_pylist()).encode("utf-8", "surrogatepass")
    return {"count": source.num_rows, "digest": blake2b(ids, digest_size=8).hexdigest()}


def check_learnable(source: pa.Table, listed: pa.Table, input: str) -> None:
    """Raise UsageError where a detector would see no box of `source`: labelled, no crowd, and with an area.

    Args:
        source: what the recipe wants of the images that were `listed` (both of schema SOURCE).
    """
    if _boxes_of(source)["learnable"]:
        return
    counts = _boxes_of(listed)
    if not counts["boxes"]:
        raise UsageError(
            f"No image of {input!r} has labelled boxes, so there is nothing to learn. Give --annotations."
        )
    raise UsageError(
        f"The {counts['boxes']} boxes of {input!r} leave nothing to learn: {counts['crowds']} are crowds "
        f"(iscrowd), and {counts['without an area']} have no area or are no numbers. Nothing was started. "
        f"Annotate single objects, or mend the boxes."
    )


def _boxes_of(source: pa.Table) -> Counter[str]:
    counts: Counter[str] = Counter()
    columns = (unlist(source.column(name)) for name in ("boxes", "labels", "crowds"))
    for boxes, labels, crowds in zip(*columns, strict=True):
        crowd = crowds if len(crowds) == len(boxes) else np.zeros(len(boxes), bool)
        with np.errstate(invalid="ignore"):
            good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        learnable = int((good & ~crowd).sum()) if len(labels) == len(boxes) else len(boxes)
        counts["boxes"] += len(boxes)
        counts["crowds"] += int(crowd.sum())
        counts["without an area"] += int((~good & ~crowd).sum())
        counts["learnable"] += learnable
    return counts
