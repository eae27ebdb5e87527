"""What a loader has to give: its input listed, its pixels planned. Needs no Ray."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from raypipe.data import sizes
from raypipe.data.sizes import Cut
from raypipe.errors import UsageError
from raypipe.images import catalog
from raypipe.images.recipe import Finish, Recipe, check_backend
from raypipe.models.detection import finish_of
from raypipe.run.result import check_report
from raypipe.run.todo import listed_for
from raypipe.stages.planning import Preprocessing
from raypipe.train.epochs import Epochs
from raypipe.train.plan import digest_of
from raypipe.train.settings import LoaderSettings


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What every rank knows.

    rows: of an epoch.
    steps: of an epoch in which nothing is rejected.
    one_label: whether each image has one label, and no boxes.
    decides: what decides the rows and their order, as JSON types.
    """

    rows: int
    steps: int
    one_label: bool
    finish: Finish | None
    classes: tuple[str, ...]
    decides: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What the rank that opens the execution knows in addition.

    cut: how rows are cut into shards.
    skipped: number of files that the listing left out, by suffix.
    """

    recipe: Recipe
    pixels: Preprocessing
    epochs: Epochs
    cut: Cut
    skipped: Mapping[str, int]

    @property
    def shard_bytes(self) -> int:
        """Memory that an actor takes for the largest shard, as far as rows were weighed."""
        return self.cut.need


def plan(settings: LoaderSettings, *, ranks: int) -> tuple[Facts, Todo]:
    """List the input, and plan what the actors do.

    Raises:
        UsageError: the settings or the input cannot be used.
    """
    settings.check()
    source, decoding, loading = settings.source, settings.decoding, settings.loading
    check_report(settings.running.report)
    recipe = catalog.get(loading.recipe)
    check_backend(recipe, decoding.backend)
    listed = listed_for(recipe, source, limit=settings.running.limit)
    rows = listed.rows
    cut = sizes.cut(
        recipe,
        images=rows.num_rows,
        rows=settings.running.shard_rows,
        backend=decoding.backend,
        memory=decoding.memory,
        max_pixels=decoding.max_pixels,
    )
    epochs = Epochs(
        source=rows,
        epochs=loading.epochs,
        seed=source.seed if loading.shuffle else None,
        rows_per_shard=cut.rows,
        weigh=cut.weigh,
    )
    facts = Facts(
        rows=rows.num_rows,
        steps=epochs.steps(loading.batch_size, ranks=ranks, equal=loading.equal),
        one_label=_one_label(rows),
        finish=finish_of(recipe) if loading.finish == "device" else None,
        classes=listed.classes,
        decides={**digest_of(rows), "seed": source.seed, "shuffle": loading.shuffle},
    )
    _check_enough(facts, settings, ranks)
    todo = Todo(
        recipe=recipe,
        # Rows of an epoch keep their order, so none can be given back for a later shard.
        pixels=replace(decoding.pixels(recipe, seed=source.seed), gives_back=False),
        epochs=epochs,
        cut=cut,
        skipped=listed.skipped,
    )
    return facts, todo


def _check_enough(facts: Facts, settings: LoaderSettings, ranks: int) -> None:
    """Raise UsageError if an epoch has not one step."""
    if facts.steps:
        return
    each = f"a batch of {settings.loading.batch_size}" if settings.loading.equal else "an image"
    raise UsageError(
        f"{settings.source.input!r} has {facts.rows} images, and each of {ranks} ranks needs "
        f"{each} in every step. Nothing was started. Give more images, a smaller batch_size or "
        f"fewer ranks."
    )


def _one_label(rows: pa.Table) -> bool:
    boxes, labels = (pc.list_value_length(rows.column(name)) for name in ("boxes", "labels"))
    return pc.max(boxes).as_py() == 0 and pc.all(pc.equal(labels, 1)).as_py()


def device_of(wanted: str | None, *, finished: bool) -> torch.device:
    """The device for batches.

    Args:
        wanted: what the user asks for; None: this rank's GPU, or the CPU if there is none.
        finished: whether batches are finished; others stay on the CPU.

    Raises:
        UsageError: there is no such device.
    """
    if not finished:
        return torch.device("cpu")
    try:
        if wanted is None:
            return _own_device()
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {wanted!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    import ray.train
    import ray.train.torch

    try:
        ray.train.get_context().get_world_rank()
    except RuntimeError:  # not in a worker of Ray Train
        local = os.environ.get("LOCAL_RANK", "")
        own = int(local) if local.isdigit() and int(local) < torch.cuda.device_count() else None
        return torch.device("cuda", torch.cuda.current_device() if own is None else own)
    return ray.train.torch.get_device()
