"""What a training has to do: the epochs to train on, shuffled, and the rows to judge on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray

from raypipe.data import sizes
from raypipe.data.listing import look
from raypipe.data.sizes import Cut
from raypipe.data.tables import Listed, unlist
from raypipe.data.work import make_work, wanted_by
from raypipe.errors import UsageError
from raypipe.images import catalog
from raypipe.images.recipe import Finish, Recipe, check_backend, for_evaluation
from raypipe.models import detection
from raypipe.models.detection import Classes
from raypipe.run.settings import recipe_identity
from raypipe.stages.planning import Preprocessing
from raypipe.stages.stage import Meter
from raypipe.train.epochs import Epochs, Segment
from raypipe.train.settings import Learning, Model, Settings


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train, as a worker needs it.

    rows: number of rows of all epochs.
    decides: what decides the rows and their order, as JSON types.
    left: a recipe whose ops the workers do on their devices.
    trust: the user's own classes that a checkpoint may hold.
    """

    learning: Learning
    model: Model
    classes: Classes
    finish: Finish
    rows: int
    decides: dict[str, Any]
    left: Recipe | None = None
    seed: int = 0
    threads: int = 1
    compile: bool = False
    checkpoint_every: int | None = None
    trust: tuple[str, ...] = ()


class Tell(Protocol):
    """Where rank 0 reports its progress."""

    def tell(self, record: dict[str, Any]) -> None:
        """Take one record; `record["kind"]` is "step" or "epoch"."""

    def flush(self) -> None:
        """Return when all records have arrived."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is started with.

    attempt: the folder for this attempt's checkpoints.
    resume: the checkpoint to go on from.
    segment: what this attempt trains on, without its rows.
    holdout: references to blocks (schema BLOCK) that nobody trains on.
    dropped: boxes of the hold-out that could not be used (journal.Dropped).
    """

    training: Training
    settings: dict[str, Any]
    attempt: str
    resume: str | None
    segment: Segment
    holdout: Sequence[ray.ObjectRef]
    board: Tell
    meter: Meter
    row_log: str | None = None
    dropped: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a training has to do.

    holdout: the rows to judge on (schema WORK).
    deciding: what decides the weights, as JSON types. A checkpoint with others is refused.
    skipped: number of files that the listing left out, by suffix.
    cut: how rows are cut into shards.
    """

    recipe: Recipe
    epochs: Epochs
    holdout: pa.Table
    training: Training
    pixels: Preprocessing
    deciding: dict[str, Any]
    skipped: dict[str, int]
    cut: Cut

    @property
    def shard_bytes(self) -> int:
        """Memory that an actor takes for the largest shard, as far as rows were weighed."""
        return self.cut.need


def plan(settings: Settings) -> Todo:
    """List the input, and decide which rows are trained on, in which order.

    Raises:
        UsageError: the settings, the model or the input cannot be used. Nothing was changed.
    """
    settings.check()
    seed, learning, decoding = settings.source.seed, settings.learning, settings.decoding
    recipe = catalog.get(learning.recipe)
    on_device = learning.ops_on == "device"
    check_backend(recipe, "torchvision" if on_device else decoding.backend)
    check_backend(for_evaluation(recipe), decoding.backend)  # makes the hold-out
    detection.check(settings.model.model, recipe.fixed_size)
    found, listed, held = _listed(settings)
    source = wanted_by(listed, needs_boxes=recipe.needs_boxes, drops_crowds=recipe.drops_crowds)
    classes = Classes.among(unlist(source.column("labels")))
    check_learnable(source, listed, settings.source.input)
    shape = partial(
        sizes.cut,
        images=source.num_rows,
        rows=settings.running.shard_rows,
        backend=decoding.backend,
        memory=decoding.memory,
        max_pixels=decoding.max_pixels,
    )
    cut = shape(replace(recipe, ops=()) if on_device else recipe)
    epochs = Epochs(
        source=source,
        epochs=learning.epochs,
        seed=seed,
        rows_per_shard=cut.rows,
        weigh=cut.weigh,
    )
    workers = settings.training
    return Todo(
        recipe=recipe,
        epochs=epochs,
        holdout=make_work(held, **shape(for_evaluation(recipe)).arguments),
        training=Training(
            learning=learning,
            model=settings.model,
            classes=classes,
            finish=detection.finish_of(recipe),
            rows=epochs.total,
            decides={**digest_of(source), "seed": seed, "shuffle": True},
            left=recipe if on_device else None,
            seed=seed,
            threads=workers.worker_threads,
            compile=workers.compile,
            checkpoint_every=workers.checkpoint_every,
            trust=workers.trust,
        ),
        # Rows of an epoch keep their order, so none can be given back for a later shard.
        pixels=replace(decoding.pixels(recipe, seed=seed, decode_only=on_device), gives_back=False),
        deciding={
            **settings.decided(),
            "recipe": recipe_identity(recipe),
            "images": digest_of(source),
            "holdout": digest_of(held),
            "classes": list(classes.ids),
        },
        skipped=dict(found.skipped),
        cut=cut,
    )


def _listed(settings: Settings) -> tuple[Listed, pa.Table, pa.Table]:
    """The listing, and the rows to train on and the rows to judge on (schema SOURCE)."""
    source, holdout = settings.source, settings.holdout
    found = look(
        source.input,
        annotations=source.annotations,
        labels=source.labels,
        limit=settings.running.limit,
        seed=source.seed,
    )
    if holdout.holdout_input is None:
        return found, *split(found.rows, share=holdout.holdout, seed=source.seed)
    held = look(holdout.holdout_input, annotations=holdout.holdout_annotations, seed=source.seed)
    return Listed(found.rows, found.skipped + held.skipped), found.rows, held.rows


def split(source: pa.Table, *, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Take a random share of the rows out of `source`.

    Which rows is a function of the seed and their number.

    Returns:
        The remaining rows, and the share, each in order.
    """
    held = np.zeros(source.num_rows, bool)
    count = round(share * source.num_rows)
    held[np.random.default_rng([seed, 0x401D]).permutation(source.num_rows)[:count]] = True
    return source.filter(pa.array(~held)), source.filter(pa.array(held))


def digest_of(source: pa.Table) -> dict[str, Any]:
    """What identifies a list of images: their number, and a digest of their ids in order."""
    ids = "\n".join(source.column("image_id").to_pylist()).encode("utf-8", "surrogatepass")
    return {"count": source.num_rows, "digest": blake2b(ids, digest_size=8).hexdigest()}


def check_learnable(source: pa.Table, listed: pa.Table, input: str) -> None:
    """Check that a detector can learn from a box: one with a label and an area that is no crowd.

    Crowds alone do not do, also where a recipe keeps them beside others.

    Args:
        source: the images that the recipe takes (schema SOURCE).
        listed: all images (schema SOURCE).

    Raises:
        UsageError: `source` has no such box.
    """
    if _boxes_of(source)["learnable"]:
        return
    counts = _boxes_of(listed)
    if not counts["boxes"]:
        raise UsageError(
            f"No image of {input!r} has labelled boxes, so there is nothing to learn. "
            f"Give --annotations."
        )
    raise UsageError(
        f"The {counts['boxes']} boxes of {input!r} leave nothing to learn: {counts['crowds']} are "
        f"crowds (iscrowd), and {counts['without an area']} have no area or are no numbers. "
        f"Nothing was started. Annotate single objects, or mend the boxes."
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
