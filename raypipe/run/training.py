"""A training run: preprocess actors feed Ray Train workers, all epochs in one execution; it goes on from its last checkpoint.

The work is a table, here too: all epochs' rows, shuffled, less those that the checkpoint says were consumed. A worker that dies, a node
that is lost or a driver that is killed all end the same way: the table is made again from the last checkpoint, and training goes on from
there, with as many workers and actors as there are then. Ray Train's own restarts are off, because it would run the same dataset again.
"""

import json
import math
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from rich.console import Console

from raypipe import UsageError
from raypipe.data import journal, lease, location, sizes
from raypipe.data.journal import Dropped, Rejected
from raypipe.data.listing import list_images, look
from raypipe.data.location import StoreError
from raypipe.data.patience import READ_PATIENCE_S
from raypipe.data.work import make_work, unlist, untouched, wanted_by
from raypipe.images import backend as backend_module
from raypipe.images import catalog
from raypipe.images.decode import MAX_PIXELS
from raypipe.images.recipe import Recipe, for_evaluation, to_json
from raypipe.insight import planner
from raypipe.insight import report as reports
from raypipe.insight.report import PoolView
from raypipe.models import checkpoint as checkpoints
from raypipe.models import detection
from raypipe.models.checkpoint import Progress
from raypipe.models.detection import Classes
from raypipe.run import pipeline, result
from raypipe.run import probe as probes
from raypipe.run.causes import Untouched, cause_of, causes
from raypipe.run.collector import Facts, collecting
from raypipe.run.command import say
from raypipe.run.following import Watch
from raypipe.run.meter import Meter
from raypipe.run.pipeline import preprocessed
from raypipe.run.registry import registered
from raypipe.run.session import (
    Pools,
    Session,
    beside_driver,
    check_shared,
    cores_here,
    hardware,
    joins,
    on_gpus,
    ray_session,
    size_pools,
    versions,
)
from raypipe.run.settings import COUNT, TRUST, check_trust, gpu_or_cpu, reading
from raypipe.run.settings import Settings as Preprocess
from raypipe.run.trainer import Board, ToBoard, Uneven, train
from raypipe.stages.batches import check_read
from raypipe.stages.preprocess import Preprocessing
from raypipe.stages.train import Assignment, Training


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What jobs/train.py takes. The first two groups decide the weights, the last only how they come about."""

    input: str
    """Folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT. Images with boxes and labels."""
    storage: str
    """Folder or URI for the checkpoints and the report; with several nodes one that all of them see."""
    annotations: str | None = None
    """COCO JSON with the boxes; --input is then the folder its file names are relative to."""
    recipe: str = "ssd-300-train"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    backend: Literal["opencv", "torchvision"] = "opencv"
    """Library that decodes and transforms."""
    ops_on: Literal["actors", "device"] = "actors"
    """Who does the recipe's ops after decoding: the preprocess actors, or torchvision in batches on the device that trains (whole images go there)."""
    limit: int | None = None
    """Only the first so many images."""
    seed: int = 0
    """Of the weights, the order, the augmentations, the hold-out, and the demo images."""
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
    holdout: float = 0.1
    """Share of the images that is not trained on but judged on after each epoch; 0: none."""
    holdout_input: str | None = None
    """Images to judge on instead: whatever --input may be."""
    holdout_annotations: str | None = None
    """COCO JSON of --holdout-input."""

    model: str = "ssd_tiny"
    """ssd_tiny (CPU), ssd300_vgg16, ssdlite320_mobilenet_v3_large, retinanet_resnet50_fpn_v2, fasterrcnn_resnet50_fpn_v2, or module:function."""
    model_arguments: str = "{}"
    """JSON object of the model's own arguments."""
    trust: TRUST = ()
    """Classes outside raypipe that the checkpoints in --storage may hold, as module:name; may be given several times. What --model and the recipe
    file name needs none."""
    epochs: int = 10
    """How often each image is seen; decides the schedule of the learning rate too."""
    batch_size: int = 16
    """Images a step, over all workers together."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """How weights follow gradients."""
    lr: float = 1e-3
    """Learning rate, after the warm-up."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 5e-4
    """Pull of the weights to zero."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls: cosine to 0, or step: to a tenth at 2/3 and again at 8/9 of the run."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises from 0."""
    clip: float = 10.0
    """Largest norm of a gradient; 0: any."""
    amp: Literal["auto", "on", "off"] = "auto"
    """bfloat16 arithmetic; auto: on GPUs that have it."""
    compile: bool = False
    """Compile the model's backbone: minutes at the start, faster steps."""

    workers: int = 1
    """Training workers: one a GPU, or one a CPU."""
    gpu: bool = False
    """Train on GPUs, or fail. By default on GPUs if there are enough."""
    cpu: bool = False
    """Train on CPUs."""
    worker_threads: int = 1
    """Threads of each training worker on CPUs."""
    actors: COUNT = "auto"
    """Preprocess actors; auto: one for each core that no worker takes."""
    threads: int = 1
    """Threads that OpenCV or torch may use within each preprocess actor."""
    read_ms: float = 0.0
    """Have every image take so many milliseconds longer to read, as from a slow store: to try what waiting does."""
    read_patience: float = READ_PATIENCE_S
    """Seconds for which a store that does not answer is asked again; then the training stops, and goes on from its last checkpoint."""
    shard_rows: int | None = None
    """Images a shard; by default as many as make 64 MiB of output."""
    checkpoint_every: int | None = None
    """A checkpoint every so many steps, beside the one after each epoch."""
    keep: int = 2
    """Checkpoints to keep, the latest ones."""
    resume: bool = True
    """--no-resume deletes the checkpoints in --storage and starts again."""
    retries: int = 3
    """How often to go on by itself after workers died, without a new checkpoint in between."""
    max_reject_fraction: float = 0.01
    """The run counts as failed when more than this share of the rows was rejected."""
    run_id: str | None = None
    """Name of this run; by default made from the time."""
    report: str | None = None
    """Folder for report.json and report.html too; by default only STORAGE/_raypipe."""
    row_log: str | None = None
    """Local folder for a log of the image ids of each step: JSON lines, a file a worker."""

    def check(self) -> None:
        """Raises UsageError for a value that no run can use."""
        self.preprocessing.check()
        positive: dict[str, int | None] = {
            "epochs": self.epochs,
            "batch-size": self.batch_size,
            "workers": self.workers,
            "keep": self.keep,
        }
        positive |= {
            "worker-threads": self.worker_threads,
            "checkpoint-every": self.checkpoint_every,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1.")
        above_zero = {"lr": self.lr}
        not_negative = {
            "momentum": self.momentum,
            "weight-decay": self.weight_decay,
            "clip": self.clip,
            "retries": self.retries,
        }
        for name, number in (above_zero | not_negative).items():
            if not np.isfinite(number) or number < 0 or (name in above_zero and number == 0):
                raise UsageError(
                    f"--{name} is {number}; it must be {'above 0' if name in above_zero else 'at least 0'}."
                )
        for name, share in {"holdout": self.holdout, "warmup": self.warmup}.items():
            if not 0 <= share < 1:
                raise UsageError(f"--{name} is {share}; it is a share, from 0 to less than 1.")
        gpu_or_cpu(gpu=self.gpu, cpu=self.cpu)
        check_trust(self.trust)
        if self.batch_size < self.workers:
            raise UsageError(
                f"--batch-size is {self.batch_size} for {self.workers} workers, so some would have no image in any step. It counts the images of "
                f"all workers together: give at least {self.workers}."
            )
        if self.holdout_annotations is not None and self.holdout_input is None:
            raise UsageError(
                f"--holdout-annotations {self.holdout_annotations!r} says nothing of where its images are. Give --holdout-input."
            )

    @property
    def preprocessing(self) -> Preprocess:
        """The input side, as jobs/preprocess.py has it."""
        names = (
            "input",
            "annotations",
            "recipe",
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
            "read_patience",
            "shard_rows",
        )
        return Preprocess(
            **{name: getattr(self, name) for name in names},
            max_reject_fraction=self.max_reject_fraction,
            run_id=self.run_id,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The model's own. Raises UsageError if they are no JSON object."""
        try:
            found = json.loads(self.model_arguments)
        except ValueError as error:
            raise UsageError(
                f"--model-arguments {self.model_arguments!r} is not JSON: {error}"
            ) from error
        if not isinstance(found, dict):
            raise UsageError(
                f'--model-arguments {self.model_arguments!r} must be an object, like {{"detections_per_img": 50}}'
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a training has to do: `work` are the rows of all epochs, `holdout` those that it is judged on (schema WORK)."""

    recipe: Recipe
    work: pa.Table
    holdout: pa.Table
    training: Training
    deciding: dict[str, Any]
    skipped: dict[str, int]
    shard_bytes: int = 0  # that an actor takes for the largest shard, as far as known


def split(source: pa.Table, *, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """`source` without a random share of its rows, and these; each in the order of `source`. A function of the seed and the number."""
    held = np.zeros(source.num_rows, bool)
    count = round(share * source.num_rows)
    held[np.random.default_rng([seed, 0x401D]).permutation(source.num_rows)[:count]] = True
    return source.filter(pa.array(~held)), source.filter(pa.array(held))


def plan(settings: Settings) -> Todo:
    """List the input, and decide what is trained on in which order.

    Raises:
        UsageError: the settings, the model or the input cannot be used. Nothing was changed.
    """
    settings.check()
    recipe = catalog.get(settings.recipe)
    on_device = settings.ops_on == "device"
    backend_module("torchvision" if on_device else settings.backend).check(recipe)
    backend_module(settings.backend).check(
        for_evaluation(recipe)
    )  # which actors make what is judged on with
    detection.check(settings.model, recipe.fixed_size)
    found = look(
        settings.input, annotations=settings.annotations, limit=settings.limit, seed=settings.seed
    )
    listed = found.rows
    if settings.holdout_input is not None:
        held = list_images(
            settings.holdout_input, annotations=settings.holdout_annotations, seed=settings.seed
        )
    else:
        listed, held = split(listed, share=settings.holdout, seed=settings.seed)
    source = wanted_by(listed, needs_boxes=recipe.needs_boxes, drops_crowds=recipe.drops_crowds)
    classes = Classes.among(unlist(source.column("labels")))
    check_learnable(source, listed, settings.input)
    shape = partial(
        sizes.cut,
        images=source.num_rows,
        rows=settings.shard_rows,
        scratch=backend_module(settings.backend).SCRATCH,
        memory=settings.preprocessing.memory,
        max_pixels=settings.max_pixels,
    )
    cut = shape(replace(recipe, ops=()) if on_device else recipe)
    work = make_work(source, **cut.arguments, epochs=settings.epochs, shuffle_seed=settings.seed)
    training = Training(
        model=settings.model,
        arguments=settings.arguments,
        classes=classes,
        finish=detection.finish_of(recipe),
        left=recipe if on_device else None,
        rows=work.num_rows,
        clip=settings.clip or None,
        threads=settings.worker_threads,
        **{name: getattr(settings, name) for name in _PASSED_ON},
    )
    deciding = {
        "input": settings.input
        if settings.input.startswith("demo")
        else location.absolute(settings.input),
        "images": _told_apart(source),
        "holdout": _told_apart(held),
        "recipe": {key: value for key, value in to_json(recipe).items() if key != "description"},
        "model": {"name": settings.model, "arguments": settings.arguments},
        "classes": list(classes.ids),
        **{name: getattr(settings, name) for name in _DECIDING},
    }
    return Todo(
        recipe=recipe,
        work=work,
        holdout=make_work(held, **shape(for_evaluation(recipe)).arguments),
        training=training,
        deciding=deciding,
        shard_bytes=cut.need,
        skipped=dict(found.skipped),
    )


_DECIDING = (
    *(
        "backend",
        "ops_on",
        "seed",
        "max_pixels",
        "actor_memory",
        "image_seconds",
        "decoder",
        "damaged",
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "momentum",
        "weight_decay",
        "schedule",
    ),
    *("warmup", "clip", "amp"),
)
_PASSED_ON = (
    *(
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "momentum",
        "weight_decay",
        "schedule",
        "warmup",
        "amp",
        "compile",
    ),
    *("seed", "checkpoint_every", "trust"),
)


def _told_apart(source: pa.Table) -> dict[str, Any]:
    """What tells one list of images from another: their number, and a digest of their ids in order."""
    ids = "\n".join(source.column("image_id").to_pylist())
    return {
        "count": source.num_rows,
        "digest": blake2b(ids.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
    }


def check_learnable(source: pa.Table, listed: pa.Table, input: str) -> None:
    """Raises UsageError where a detector would see no box of `source`: labelled, no crowd, and with an area.

    `source` is what the recipe wants of the images that were `listed` (both of schema SOURCE).
    """
    if _boxes_of(source)["learnable"]:
        return
    counts = _boxes_of(listed)
    if not counts["boxes"]:
        raise UsageError(
            f"No image of {input!r} has labelled boxes, so there is nothing to learn. Give --annotations."
        )
    raise UsageError(
        f"The {counts['boxes']} boxes of {input!r} leave nothing to learn: {counts['crowds']} are crowds (iscrowd), and "
        f"{counts['without an area']} have no area or are no numbers. Nothing was started. Annotate single objects, or mend the boxes."
    )


def _boxes_of(source: pa.Table) -> Counter[str]:
    counts: Counter[str] = Counter()
    columns = (unlist(source.column(name)) for name in ("boxes", "labels", "crowds"))
    for boxes, labels, crowds in zip(*columns, strict=True):
        crowd = crowds if len(crowds) == len(boxes) else np.zeros(len(boxes), bool)
        with np.errstate(invalid="ignore"):
            good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        counts["boxes"] += len(boxes)
        counts["crowds"] += int(crowd.sum())
        counts["without an area"] += int((~good & ~crowd).sum())
        counts["learnable"] += (
            int((good & ~crowd).sum()) if len(labels) == len(boxes) else len(boxes)
        )
    return counts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended. `report` is None when there was nothing left to do. `checkpoint`: the last one's folder."""

    report: dict[str, Any] | None
    progress: Progress
    rows: int
    checkpoint: str


def run(settings: Settings, *, console: Console | None = None) -> Outcome:
    """Do what `settings` say.

    Args:
        console: what to tell the user on; by default the terminal (stderr).

    Raises:
        UsageError: the message is for the user.
        KeyboardInterrupt: checkpoints so far are kept, and the same settings go on.
    """
    started = time.time()
    console = console or Console(stderr=True)
    touched = False

    def touch() -> None:
        nonlocal touched
        touched = True

    try:
        return _run(settings, console, started=started, touch=touch)
    except KeyboardInterrupt as error:
        if not touched:
            raise Untouched from error
        raise


def _run(
    settings: Settings, console: Console, *, started: float, touch: Callable[[], None]
) -> Outcome:
    storage = location.absolute(settings.storage)
    say(console, f"Listing {settings.input} ...")
    todo = plan(settings)
    result.check_report(settings.report)
    _check_row_log(settings.row_log)
    lease.check(storage, option="--storage")
    clears = not settings.resume or journal.is_clearing(storage)
    progress, folder = (Progress(), None) if clears else _latest(storage, todo)
    total = todo.work.num_rows
    run_id = settings.run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    if folder is not None and progress.epoch == settings.epochs:
        skipped = todo.skipped
        return _nothing_left(
            settings,
            storage,
            progress,
            folder,
            console=console,
            run_id=run_id,
            total=total,
            skipped=skipped,
        )
    if folder is not None:
        say(
            console,
            f"Going on from {folder}: {progress.rows} of {total} rows are done, in {progress.step} steps.",
        )
    before = progress.rows
    say(console, "Starting Ray ..." if not os.environ.get("RAY_ADDRESS") else "Joining Ray ...")
    alone = ray_session(
        _sized(settings), beside=_cpus_for_workers(settings), shard_bytes=todo.shard_bytes
    )
    with probes.started(_probe(settings, todo)) as timing, alone as session:
        on_gpu = on_gpus(
            settings.workers,
            "workers",
            must=gpu_or_cpu(gpu=settings.gpu, cpu=settings.cpu),
            session=session,
        )
        timed = probes.finish(timing)
        pools = size_pools(_sized(settings), None, session, images=total)
        with (
            _claimed(
                settings,
                storage,
                run_id,
                session,
                clears=clears,
                seen=folder,
                console=console,
                touch=touch,
            ) as check,
            registered(run_id, address=session.address, output=settings.storage),
            collecting(
                run_id, _facts(settings, todo, session, rows=total - before, on_gpu=on_gpu)
            ) as collector,
        ):
            board = ray.remote(Board).options(**beside_driver()).remote()
            say(console, _opening(run_id, settings, todo, session, pools, on_gpu))
            say(console, pipeline.watching(run_id, session))
            machine = psutil.cpu_times()
            begun, begun_at = time.perf_counter(), time.time()
            collector.begin.remote(begun_at)
            held = _held_out(todo, settings, pools, session, run_id)
            watch = Watch(
                console,
                total,
                collector,
                begun_at=begun_at,
                before=(before, progress.rejected),
                rows=before,
            )
            failures = attempt = 0
            said: str | None = None
            while True:
                attempt += 1
                try:
                    _attempt(
                        settings,
                        todo,
                        name=f"{run_id}-{attempt}",
                        resume=folder,
                        on_gpu=on_gpu,
                        pools=pools,
                        cpus_each=session.cpus_each,
                        held=held,
                        collector=collector,
                        board=board,
                        watch=watch,
                        check=check,
                    )
                    break
                except ray.train.TrainingFailedError as error:
                    check()
                    now, latest = _latest(storage, todo)
                    failures = 1 if now.rows > progress.rows else failures + 1
                    _give_up(error, failures, settings, before=said if failures > 1 else None)
                    said = cause_of(error)
                    progress, folder = now, latest
                    say(
                        console,
                        f"A worker ended ({said}). Going on from {folder or 'the start'}: {progress.rows} of {total} rows are done; "
                        f"retry {failures} of {settings.retries}.",
                    )
            wall_s = time.perf_counter() - begun
            snapshot, cpu_percent = pipeline.collected(collector, since=machine)
            progress, folder = _latest(storage, todo)
            assert folder is not None
            checkpoints.prune(storage, keep=checkpoints.all_in(storage)[-settings.keep :])
            report = _report(
                settings, todo, run_id, session, progress, watch,
                clock=reports.Clock(wall_s=wall_s, setup_s=begun_at - started, ready_s=watch.began and watch.began - begun_at, outputs=watch.outputs),
                snapshot=snapshot, cpu_percent=cpu_percent, total=total, before=before, on_gpu=on_gpu, held_rejects=held.rejected, timed=timed or [],
            )  # fmt: skip
            _leave(settings, storage, report, progress)
    return Outcome(report=report, progress=progress, rows=total, checkpoint=folder)


def _leave(settings: Settings, storage: str, report: dict[str, Any], progress: Progress) -> None:
    rejected = [Rejected(**row) for row in progress.rejects]
    dropped = [Dropped(**row) for row in progress.dropped]
    result.leave_report(storage, f"{journal.STATE}/", report, rejected, dropped=dropped)
    if settings.report is not None:
        result.leave_report(settings.report, "", report, rejected, dropped=dropped)


def _nothing_left(
    settings: Settings,
    storage: str,
    progress: Progress,
    folder: str,
    *,
    console: Console,
    run_id: str,
    total: int,
    skipped: dict[str, int],
) -> Outcome:
    """The outcome of a training that is complete. It makes the report again where the driver was killed before it could."""
    if result.is_report(location.join(storage, journal.STATE)):
        say(
            console,
            f"Nothing to do: all {settings.epochs} epochs are done; the model is in {folder}. --no-resume trains again.",
        )
        return Outcome(report=None, progress=progress, rows=total, checkpoint=folder)
    say(
        console,
        f"All {settings.epochs} epochs are done, but the run that did the last did not come to its end. Writing its report ...",
    )
    with lease.hold(storage, run_id=run_id, option="--storage", tell=partial(say, console)):
        checkpoints.prune(storage, keep=checkpoints.all_in(storage)[-settings.keep :])
        reasons = Counter(row["reason"] for row in progress.rejects)
        counts = reports.Counts(
            images_in=total,
            images_out=progress.images,
            rejects_by_reason=_in_all(reasons, progress),
            before=total,
            damaged_kept=progress.damaged,
            skipped=skipped,
            boxes_dropped=len(progress.dropped),
            boxes_from=result.frames_told(progress.boxes_from),
        )
        report = reports.unmeasured(
            run_id=run_id, settings=asdict(settings), versions=versions(), counts=counts
        )
        unknown = (
            "attempts",
            "workers",
            "accelerator_utilisation",
            "wait_share",
            "break_even",
            "holdout_rejected",
        )
        report["train"] = dict.fromkeys(unknown) | {
            "epochs": progress.epochs,
            "steps": progress.step,
            "map": progress.epochs[-1]["map"] if progress.epochs else None,
        }
        _leave(settings, storage, report, progress)
    return Outcome(report=report, progress=progress, rows=total, checkpoint=folder)


@contextmanager
def _claimed(
    settings: Settings,
    storage: str,
    run_id: str,
    session: Session,
    *,
    clears: bool,
    seen: str | None,
    console: Console,
    touch: Callable[[], None],
) -> Iterator[Callable[[], None]]:
    """The storage for this run alone, cleared where that is asked for. Yields what raises LeaseLost once it is not."""
    with lease.hold(storage, run_id=run_id, option="--storage", tell=partial(say, console)) as held:
        if session.nodes > 1 and not location.is_remote(storage):
            check_shared(
                location.join(storage, lease.FILE), option=f"--storage {settings.storage!r}"
            )
        there = checkpoints.all_in(storage)
        if not clears and (there[-1] if there else None) != seen:
            raise UsageError(
                f"--storage {settings.storage!r} has changed since this run looked at it: another training has written "
                f"there. Nothing was changed. Start this one again; it then goes on from what is there."
            )
        touch()
        if clears:
            say(console, f"Deleting the checkpoints in {settings.storage} ...")
            with journal.clearing(storage):
                for line in checkpoints.prune(storage):
                    say(console, line)
                location.delete(location.join(storage, f"{journal.STATE}/report.json"))
        yield held.check


def _check_row_log(folder: str | None) -> None:
    """Raise UsageError where logs of rows would go into a file, or be added to what is no such log."""
    if folder is None or not os.path.exists(folder):
        return
    if not os.path.isdir(folder):
        raise UsageError(
            f"--row-log {folder!r} is a file. Nothing was started. Give a folder for the logs."
        )
    for path in sorted(Path(folder).glob("*.jsonl")):
        try:
            with path.open() as file:
                first = json.loads(file.readline() or '{"step": 0, "epoch": 0, "image_ids": []}')
            known = {"step", "epoch", "image_ids"} <= first.keys()
        except Exception:  # foreign bytes
            known = False
        if not known:
            raise UsageError(
                f"--row-log {folder!r} has {path.name!r}, which is no log of raypipe's and might be written to. Nothing was "
                f"started. Give a folder without it."
            )


def _latest(storage: str, todo: Todo) -> tuple[Progress, str | None]:
    """How far the training in `storage` is, and its last checkpoint. Raises UsageError if that is of another training."""
    found = checkpoints.all_in(storage)
    if not found:
        return Progress(), None
    checkpoints.check_same(found[-1], todo.deciding)
    return checkpoints.progress_of(found[-1]), found[-1]


def _sized(settings: Settings) -> Preprocess:
    """The input side, with the number of actors for a machine of our own."""
    given = settings.preprocessing
    joined = joins()
    if given.actors == "auto" and not joined:
        return replace(given, actors=max(1, cores_here() - _cpus_for_workers(settings)))
    return given


def _facts(settings: Settings, todo: Todo, session: Session, *, rows: int, on_gpu: bool) -> Facts:
    return Facts(
        input=settings.input,
        output=settings.storage,
        recipe=todo.recipe.name,
        backend=settings.backend,
        images=rows,
        cores=session.cores,
        at_most=session.at_most + _cpus_for_workers(settings),
        auto=("preprocess",) if settings.actors == "auto" else (),
        on_gpu=("train",) if on_gpu else (),
    )


def _cpus_for_workers(settings: Settings) -> int:
    """Logical CPUs that the training workers take: one each, none where they are on GPUs."""
    return (
        0 if settings.gpu or (not settings.cpu and torch.cuda.is_available()) else settings.workers
    )


def _opening(
    run_id: str, settings: Settings, todo: Todo, session: Session, pools: Pools, on_gpu: bool
) -> str:
    images = todo.work.num_rows // settings.epochs
    dashboard = f"; Ray dashboard: http://{session.dashboard}" if session.dashboard else ""
    return (
        f"Run {run_id}: {settings.model} on {images} images, {settings.epochs} epochs, {todo.holdout.num_rows} held out, "
        f"{len(todo.training.classes)} classes, recipe {todo.recipe.name}, {settings.backend}; {pools.actors} preprocessing, "
        f"{settings.workers} training on {'GPU' if on_gpu else 'CPU'}; {session.cores:g} cores{dashboard}"
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a training is judged on: blocks (schema BLOCK), how many of their rows were rejected, and the boxes that could not be
    used (journal.Dropped, as dicts)."""

    blocks: Sequence[ray.ObjectRef] = ()
    rejected: int = 0
    dropped: Sequence[dict[str, Any]] = ()


def _held_out(
    todo: Todo, settings: Settings, pools: Pools, session: Session, run_id: str
) -> HeldOut:
    """Make the blocks to judge on, once: without chance they are the same in each epoch."""
    if not todo.holdout.num_rows:
        return HeldOut()
    pixels = replace(_pixels(todo, settings), recipe=for_evaluation(todo.recipe), decode_only=False)
    # These actors are up for this alone, and each takes a second of CPU to start: as long as 300 images.
    pools = replace(pools, actors=min(pools.actors, 1 + todo.holdout.num_rows // 300))
    dataset = preprocessed(
        todo.holdout,
        pixels,
        pools=pools,
        cpus_each=session.cpus_each,
        threads=settings.threads,
        reading=reading(settings.preprocessing),
        run_id=run_id,
    )
    with pipeline.tracks(run_id):
        made = dataset.materialize()
    refs = made.to_arrow_refs()
    rejected, dropped = 0, list[dict[str, Any]]()
    for block in made.select_columns([*journal.REJECTS.names, "boxes_dropped"]).iter_batches(
        batch_format="pyarrow"
    ):
        for row in block.to_pylist():
            dropped += [
                {"image_id": row["image_id"], "uri": row["uri"], **box}
                for box in row.pop("boxes_dropped") or ()
            ]
            if row["reason"] is not None:
                check_read(row)
                rejected += 1
    return HeldOut(blocks=refs, rejected=rejected, dropped=dropped)


def _probe(settings: Settings, todo: Todo) -> probes.Probe:
    """Times what storing preprocessed images and reading them again would cost, for the report's break-even."""
    after = pipeline.writing(
        replace(settings.preprocessing, output=settings.storage, format="parquet"), todo.recipe
    )
    how: dict[str, Any] = {
        "threads": settings.threads,
        "reading": reading(settings.preprocessing),
        "read_ms": settings.read_ms,
    }
    pixels = replace(_pixels(todo, settings), decode_only=False)
    return probes.Probe(
        rows=todo.work, settings=pixels, after=after, store_ms=0.0, stored=True, **how
    )


def _break_even(
    report: dict[str, Any], timed: list[planner.StageCost], todo: Todo
) -> dict[str, Any]:
    """What the report says of the two designs: preprocessing continuously, or once into a store and training from there."""
    if todo.recipe.random:
        why = "The recipe draws anew in each epoch, which stored images cannot: only continuous preprocessing gives these."
        return {"epochs": None, "reason": why}
    if todo.training.left is not None:
        return {
            "epochs": None,
            "reason": "The recipe's ops are done on the training device: there is nothing to store.",
        }
    try:
        measured, machine = planner.of_report(report)
        costs = {
            cost.name: cost for cost in [*timed, *measured]
        }  # what the run itself measured counts more
        stages = {name: costs[name] for name in ("preprocess", "write", "stored", "train")}
    except (ValueError, KeyError):
        return {"epochs": None, "reason": "Too little was measured to tell."}
    images = todo.work.num_rows // todo.training.epochs
    found = planner.designs(images=images, machine=machine, **stages)
    epochs = found.break_even_epochs
    if epochs is None:
        why = f"Storing saves no time: an epoch takes {found.continuous_s:.1f} s with preprocessing, {found.stored_s:.1f} s from a store."
    else:
        why = (
            f"Preprocessing once takes {found.once_s:.1f} s and saves {found.continuous_s - found.stored_s:.1f} s in each epoch: from "
            f"{math.ceil(epochs)} epochs on it takes less in all."
        )
    return {"epochs": epochs, "reason": why, **asdict(found)}


def _pixels(todo: Todo, settings: Settings) -> Preprocessing:
    return Preprocessing(
        recipe=todo.recipe,
        backend=settings.backend,
        seed=settings.seed,
        max_pixels=settings.max_pixels,
        memory=settings.preprocessing.memory,
        image_seconds=settings.image_seconds,
        decoder=settings.decoder,
        damaged=settings.damaged,
        decode_only=settings.ops_on == "device",
    )


def _attempt(
    settings: Settings,
    todo: Todo,
    *,
    name: str,
    resume: str | None,
    on_gpu: bool,
    pools: Pools,
    cpus_each: float,
    held: HeldOut,
    collector: ray.actor.ActorHandle,
    board: ray.actor.ActorHandle,
    watch: Watch,
    check: Callable[[], None],
) -> None:
    """Train from checkpoint `resume` to the end, or until a worker dies.

    Raises:
        ray.train.TrainingFailedError: a worker died or raised.
    """
    storage = location.absolute(settings.storage)
    left = todo.work
    if resume is not None:
        at = checkpoints.load(resume, trusted=settings.trust)
        left = untouched(
            left, epoch=at.progress.epoch, image_ids=pa.array(at.consumed, pa.string())
        )
    datasets = {}
    if left.num_rows:
        datasets["train"] = preprocessed(
            left,
            _pixels(todo, settings),
            pools=pools,
            cpus_each=cpus_each,
            threads=settings.threads,
            reading=reading(settings.preprocessing),
            read_ms=settings.read_ms,
            run_id=name,
            collector=collector,
        )
        # Epochs come one after the other, and a run is the same each time.
        datasets["train"].context.execution_options.preserve_order = True
    assignment = Assignment(
        training=todo.training,
        settings=todo.deciding,
        attempt=location.join(storage, name),
        resume=resume,
        has_rows=bool(left.num_rows),
        holdout=held.blocks,
        dropped=held.dropped,
        board=ToBoard(board),
        meter=Meter(stage="train", collector=collector, loops=True),
        row_log=settings.row_log and os.path.abspath(settings.row_log),
    )
    # By reference: the processes that hand it on would otherwise load torch to read it.
    given = ray.put(assignment)
    remote = {}
    if location.is_remote(storage):
        system, path = location.filesystem(storage)
        remote = {"storage_filesystem": system, "storage_path": path}
    trainer = TorchTrainer(
        train,
        train_loop_config={"assignment": given},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1, "CPU": 0} if on_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **(remote or {"storage_path": storage}),
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep),
        ),
        datasets=datasets,
        dataset_config=Uneven(),
    )
    with watch.on(board), pipeline.tracks(name):
        _fit(trainer, check)


def _fit(trainer: TorchTrainer, check: Callable[[], None]) -> None:
    """trainer.fit() in a thread of its own: in the main thread it would take Ctrl-C for itself. `check`
    is called meanwhile, and ends it by raising."""
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="raypipe-fit")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        check()
    if ended and ended[0] is not None:
        raise ended[0]


def _give_up(
    error: ray.train.TrainingFailedError, failures: int, settings: Settings, *, before: str | None
) -> None:
    """Raises what ends the run: what the user must change, a failure too often repeated, or an error of the code's own that came twice."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, UsageError | StoreError):
            raise cause
    died = any(isinstance(cause, RayError) for cause in chain)
    if failures > settings.retries or (not died and cause_of(error) == before):
        raise error


# --- the report ----------------------------------------------------------------------------------------------------------


def _report(
    settings: Settings,
    todo: Todo,
    run_id: str,
    session: Session,
    progress: Progress,
    watch: Watch,
    *,
    clock: reports.Clock,
    snapshot: dict[str, Any],
    cpu_percent: float | None,
    total: int,
    before: int,
    on_gpu: bool,
    held_rejects: int,
    timed: list[planner.StageCost],
) -> dict[str, Any]:
    workers = [worker for attempt in watch.workers for worker in attempt]
    spent = {
        what: sum(worker[what] for worker in workers)
        for what in ("wait", "step", "evaluate", "checkpoint", "wall")
    }
    busy = spent["step"] + spent["evaluate"] + spent["checkpoint"]
    count = settings.workers
    if snapshot != reports.NOTHING_SEEN:
        snapshot["pools"]["train"] = asdict(
            PoolView(
                start=count,
                min=count,
                max=count,
                end=count,
                actor_s=spent["wall"],
                starved_s=spent["wait"],
            )
        )
    mine = [actor for actor in snapshot["actors"] if actor["stage"] == "train"]
    for (
        actor
    ) in mine:  # the meter counts what the feeding thread does meanwhile; the workers know better
        actor["busy_s"] = busy / len(mine)
    reasons = Counter(row["reason"] for row in progress.rejects)
    report = reports.build(
        run_id=run_id,
        settings=asdict(settings),
        versions=versions(),
        hardware={**hardware(session), "gpus": count if on_gpu else 0},
        counts=reports.Counts(
            images_in=total,
            images_out=progress.images,
            rejects_by_reason=_in_all(reasons, progress),
            before=before,
            damaged_kept=progress.damaged,
            skipped=todo.skipped,
            boxes_dropped=len(progress.dropped),
            boxes_from=result.frames_told(progress.boxes_from),
        ),
        clock=clock,
        cpu_percent=cpu_percent,
        stage_names=["preprocess", "train"],
        on_gpu=("train",) if on_gpu else (),
        snapshot=snapshot,
    )
    report["train"] = {
        "epochs": progress.epochs,
        "steps": progress.step,
        "map": progress.epochs[-1]["map"] if progress.epochs else None,
        "holdout_rejected": held_rejects,
        "attempts": len(watch.workers),
        "workers": workers,
        "accelerator_utilisation": spent["step"] / spent["wall"] if spent["wall"] else None,
        "wait_share": spent["wait"] / spent["wall"] if spent["wall"] else None,
        "break_even": _break_even(report, timed, todo),
    }
    return report


def _in_all(reasons: Counter[str], progress: Progress) -> dict[str, int]:
    """Rejected rows of all epochs by reason, from the images that were rejected: each is in every epoch, but the last may not be over."""
    images, rows = reasons.total(), progress.rejected
    if not images:
        return {"unknown": rows} if rows else {}
    spread = {reason: count * rows // images for reason, count in reasons.most_common()}
    first = next(iter(spread))
    spread[first] += rows - sum(spread.values())
    return spread


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished training counts as failed: rows lost, or too many rejected. None: it does not."""
    progress = outcome.progress
    if progress.rows != outcome.rows:
        return (
            f"{progress.rows} of {outcome.rows} rows are accounted for: some were missed, or seen twice. This is a defect of raypipe; report it. "
            f"--no-resume trains again."
        )
    if progress.rejected > settings.max_reject_fraction * outcome.rows:
        first = progress.rejects[0]
        return (
            f"{progress.rejected} of {outcome.rows} rows were rejected, more than --max-reject-fraction {settings.max_reject_fraction:g} allows; "
            f"the model is kept. The first: {first['uri']}: {first['reason']} ({first['detail']}). All are in "
            f"{settings.storage}/{journal.STATE}/rejects.parquet."
        )
    return None
