"""What the train job takes."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from raypipe.errors import UsageError, did_you_mean
from raypipe.run.settings import (
    TRUST,
    Composed,
    Decoding,
    Device,
    Executing,
    Running,
    Source,
    check_counts,
    check_trust,
)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the model learns, and from which pixels."""

    decides: ClassVar = True

    recipe: str = "ssd-300-train"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    ops_on: Literal["actors", "device"] = "actors"
    """Where the recipe's ops run after decoding: in the preprocess actors, or with torchvision in
    batches on the device that trains (whole images go there)."""
    epochs: int = 10
    """How often each image is seen; decides the schedule of the learning rate too."""
    batch_size: int = 16
    """Images a step, over all workers together."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the weights."""
    lr: float = 1e-3
    """Learning rate, after the warm-up."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 5e-4
    """Weight decay."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls: cosine to 0; or step, to a tenth at 2/3 and again at 8/9."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises from 0."""
    clip: float = 10.0
    """Gradients are clipped to this norm; 0: never."""
    amp: Literal["auto", "on", "off"] = "auto"
    """bfloat16 arithmetic; auto: on GPUs that have it."""

    def check(self) -> None:
        """Raise UsageError for a value that no training can use."""
        check_counts({"epochs": self.epochs, "batch-size": self.batch_size})
        _check_at_least_0({"momentum": self.momentum, "weight-decay": self.weight_decay})
        _check_at_least_0({"clip": self.clip})
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--lr is {self.lr}; it must be above 0.")
        _check_share("warmup", self.warmup)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    decides: ClassVar = True

    model: str = "ssd_tiny"
    """ssd_tiny (CPU), ssd300_vgg16, ssdlite320_mobilenet_v3_large, retinanet_resnet50_fpn_v2,
    fasterrcnn_resnet50_fpn_v2, or module:function."""
    model_arguments: str = "{}"
    """JSON object of the model's own arguments."""

    def check(self) -> None:
        """Raise UsageError if the arguments are no JSON object."""
        _ = self.arguments

    @property
    def arguments(self) -> dict[str, Any]:
        """The model's own arguments. Raises UsageError if they are no JSON object."""
        try:
            found = json.loads(self.model_arguments)
        except ValueError as error:
            raise UsageError(
                f"--model-arguments {self.model_arguments!r} is not JSON: {error}"
            ) from error
        if not isinstance(found, dict):
            raise UsageError(
                f"--model-arguments {self.model_arguments!r} must be an object, "
                f'like {{"detections_per_img": 50}}'
            )
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as JSON types."""
        return {"model": {"name": self.model, "arguments": self.arguments}}


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """What the model is judged on."""

    decides: ClassVar = True

    holdout: float = 0.1
    """Share of the images to judge on after each epoch instead of training on them; 0: none."""
    holdout_input: str | None = None
    """Images to judge on instead: whatever --input may be."""
    holdout_annotations: str | None = None
    """COCO JSON of --holdout-input."""

    def check(self) -> None:
        """Raise UsageError for a value that no training can use."""
        _check_share("holdout", self.holdout)
        if self.holdout_annotations is not None and self.holdout_input is None:
            raise UsageError(
                f"--holdout-annotations {self.holdout_annotations!r} does not say where its images "
                f"are. Give --holdout-input."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Nothing: a checkpoint must agree with the images themselves (`Todo.deciding`)."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where checkpoints go, and who trains."""

    decides: ClassVar = False

    storage: str
    """Folder or URI for checkpoints and report; with several nodes, one that all of them see."""
    workers: int = 1
    """Training workers: one a GPU, or one a CPU."""
    worker_threads: int = 1
    """Threads of each training worker on CPUs."""
    compile: bool = False
    """Compile the model's backbone: minutes at the start, faster steps."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, in addition to the one after each epoch."""
    keep: int = 2
    """Checkpoints to keep, the latest ones."""
    retries: int = 3
    """How often to go on after workers died, without a new checkpoint in between."""
    row_log: str | None = None
    """Local folder for a log of the image ids of each step: JSON lines, a file a worker."""
    trust: TRUST = ()
    """Classes outside raypipe that the checkpoints in --storage may hold, as module:name; may be
    given several times. What --model and the recipe file name needs none."""

    def check(self) -> None:
        """Raise UsageError for a value that no training can use."""
        check_counts(
            {
                "workers": self.workers,
                "worker-threads": self.worker_threads,
                "checkpoint-every": self.checkpoint_every,
                "keep": self.keep,
            }
        )
        _check_at_least_0({"retries": self.retries})
        check_trust(self.trust)
        _check_row_log(self.row_log)


@dataclass(frozen=True, kw_only=True)
class Settings(Composed):
    """What the train job takes."""

    source: Source
    training: Workers
    decoding: Decoding = field(default_factory=Decoding)
    learning: Learning = field(default_factory=Learning)
    model: Model = field(default_factory=Model)
    holdout: Holdout = field(default_factory=Holdout)
    device: Device = field(default_factory=Device)
    running: Running = field(default_factory=Running)

    def check(self) -> None:
        """Raise UsageError for a value, or for values together, that no training can use."""
        super().check()
        batch_size, workers = self.learning.batch_size, self.training.workers
        if batch_size < workers:
            raise UsageError(
                f"--batch-size is {batch_size} for {workers} workers, so some would have no image "
                f"in any step. It counts the images of all workers together: give at least "
                f"{workers}."
            )


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What a loader gives to the loop."""

    decides: ClassVar = True

    recipe: str = "photos-300"
    """Name (`raypipe recipes` lists them) or a JSON file."""
    batch_size: int = 32
    """Images of a batch, on each rank."""
    epochs: int = 1
    """How often each image is given. Passes beyond are empty."""
    shuffle: bool = True
    """Order by the seed and the epoch; False: the order of the input, in each epoch."""
    finish: Literal["device"] | None = None
    """device: float batches, normalised by the recipe's finish, on the device that trains."""
    device: str | None = None
    """The device of finish="device"; by default the GPU of this rank, or the CPU without one."""
    equal: Literal["drop", "repeat"] | None = None
    """How all batches get batch_size images. drop: images that are left at the end of an epoch are
    not given in that epoch. repeat: the last batches are filled up with images of the epoch, which
    then count twice. By default batches are not equal, and each image is given exactly once."""

    def check(self) -> None:
        """Raise UsageError for a value that no loader can use."""
        check_counts({"batch-size": self.batch_size, "epochs": self.epochs})
        for name, value, known in (
            ("finish", self.finish, ("device",)),
            ("equal", self.equal, ("drop", "repeat")),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} is {value!r}{did_you_mean(value, known)}")
        if self.device is not None and self.finish is None:
            raise UsageError(
                f"device is {self.device!r}, but only finished batches are on a device. Give "
                f'finish="device" too, or leave it out.'
            )


@dataclass(frozen=True, kw_only=True)
class LoaderSettings(Composed):
    """What a loader takes."""

    source: Source
    decoding: Decoding = field(default_factory=Decoding)
    loading: Loading = field(default_factory=Loading)
    running: Executing = field(default_factory=Executing)


def _check_at_least_0(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"--{name} is {value}; it must be at least 0.")


def _check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise UsageError(f"--{name} is {share}; it is a share, from 0 to less than 1.")


def _check_row_log(folder: str | None) -> None:
    """Raise UsageError if row logs would go into a file, or be appended to other logs."""
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
                f"--row-log {folder!r} has {path.name!r}, which is no row log and might be "
                f"appended to. Nothing was started. Give a folder without it."
            )
