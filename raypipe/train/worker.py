"""The train stage: blocks of pixels in, a trained model out. Each Ray Train worker runs `train_worker`.

A step is one batch over all workers. Before each, the workers tell each other what they have next (one tiny gather): rows of the
epoch that all still have to finish, of a later one, or none. So ranks may get different numbers of rows: who has none left takes part
with an empty step, nobody waits for ever, and no row is dropped to make the numbers even. The gradient is that of the mean over all images of
the step, whoever had them.

A worker thread prepares the next batches on the device while the model trains on this one: copied from pinned memory on a stream of its own,
finished (float, normalised, padded) there.
"""

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raypipe.data.batches import Batch, batches
from raypipe.data.location import Location
from raypipe.errors import UsageError
from raypipe.models import checkpoint as checkpoints
from raypipe.models import detection
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.models.evaluate import Precision, mean_average_precision
from raypipe.models.placer import Placed, Placer, evaluate, uses_bf16
from raypipe.stages.gpu import GpuMeter
from raypipe.stages.stage import Meter
from raypipe.train.clock import Clock, lr_factor
from raypipe.train.feed import Feed
from raypipe.train.peers import Peers
from raypipe.train.plan import Training
from raypipe.train.settings import Learning

TELL_EVERY_S = 1.0


class Tell(Protocol):
    """Where rank 0 says how it goes."""

    def tell(self, record: dict[str, Any]) -> None:
        """Take one record; `record["kind"]` is "step" or "epoch"."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is started with. `holdout`: references to blocks (schema BLOCK) that nobody trains on."""

    training: Training
    settings: dict[str, Any]
    attempt: str  # folder for this attempt's checkpoints
    resume: str | None
    has_rows: bool
    holdout: Sequence[ray.ObjectRef]
    board: Tell
    meter: Meter
    row_log: str | None = None
    dropped: Sequence[
        dict[str, Any]
    ] = ()  # boxes of the hold-out that could not be used (journal.Dropped)


class _Loss(nn.Module):
    """The model and its loss as one module, so that DDP sees each step as one call; also an empty one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        if not images:
            # Zero, but it depends on every parameter: DDP gets a gradient of zeros for each, and batch norms see nothing.
            return (
                torch.stack(
                    [
                        parameter.sum()
                        for parameter in self.model.parameters()
                        if parameter.requires_grad
                    ]
                ).sum()
                * 0.0
            )
        with _settled_norms(self.model) if len(images) == 1 else contextlib.nullcontext():
            return detection.total(self.model(images, targets))


@contextlib.contextmanager
def _settled_norms(model: nn.Module) -> Iterator[None]:
    """Batch norms use what they know of other batches: one image alone has no statistics where its feature map is 1x1, and torch raises."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


# --- the worker ----------------------------------------------------------------------------------------------------------


class Worker:
    """One rank. `run` trains to the end; `report` is called together by all ranks at each checkpoint."""

    def __init__(
        self,
        assignment: Assignment,
        *,
        device: torch.device,
        peers: Peers,
        blocks: Iterable[pa.Table],
        holdout: Sequence[pa.Table],
        report: Callable[[dict[str, Any], str | None], None],
    ):
        training = assignment.training
        self._assignment, self._training = assignment, training
        self._device, self._peers, self._holdout, self._report = device, peers, holdout, report
        torch.set_num_threads(training.threads)
        torch.manual_seed(training.seed)
        self._model = detection.build(
            training.model.model,
            num_classes=len(training.classes) + 1,
            arguments=training.model.arguments,
        ).to(device)
        if device.type == "cuda":
            self._model = self._model.to(memory_format=torch.channels_last)
        self._optimizer = optimizer_for(self._model, training.learning)
        self._progress = Progress(dropped=list(assignment.dropped))
        self._consumed: list[
            str
        ] = []  # of all ranks, on rank 0 alone; of this rank since the last checkpoint elsewhere
        self._new: list[str] = []
        self._rejects: list[dict[str, str]] = []
        self._dropped: list[dict[str, Any]] = []
        self._damaged = 0
        self._boxes_from: Counter[str] = Counter()
        # Whether all of this epoch is seen by this attempt; and how many boxes of it this rank has learned from.
        self._whole, self._learned = True, 0
        if assignment.resume is None:
            self._seed_rank()
        else:
            self._restore(checkpoints.load(assignment.resume, trusted=training.trust))
        if training.compile:
            # The backbone is nearly all of the arithmetic; the rest of a detection model has shapes that differ from image to image.
            getattr(self._model, "backbone", self._model).compile()
        loss = _Loss(self._model)
        self._loss: nn.Module = loss
        if peers.size > 1:
            self._loss = DistributedDataParallel(
                loss, device_ids=[device] if device.type == "cuda" else None
            )
        self._train_placer = Placer(
            device, training.finish, training.classes, left=training.left, seed=training.seed
        )
        self._placer = Placer(
            device, training.finish, training.classes
        )  # of what is judged on, which actors have done whole
        share = training.learning.batch_size // peers.size + (
            peers.rank < training.learning.batch_size % peers.size
        )
        self._share = max(share, 1)
        self._feed = Feed(batches(blocks, self._share), self._train_placer, device)
        self._amp = uses_bf16(training.learning.amp, device)
        self._gpu = GpuMeter(device)
        assignment.meter.start(self._gpu)
        self._clock = Clock(device)
        self._begun = False
        self._log = _RowLog(assignment.row_log, assignment.attempt, peers.rank)
        self._lost = torch.zeros(
            (), device=device
        )  # sum over this epoch's images of this rank of the loss
        self._images = 0
        self._epoch_begun = (time.perf_counter(), self._progress.images, self._clock.read())
        self._told = time.perf_counter()
        self._told_images = self._progress.images

    def _seed_rank(self) -> None:
        key = np.random.SeedSequence(
            [self._training.seed, self._peers.rank, self._progress.step]
        ).generate_state(1, np.uint64)
        torch.manual_seed(int(key[0] >> np.uint64(1)))

    def _restore(self, before: Checkpoint) -> None:
        self._model.load_state_dict(before.state["model"])
        self._optimizer.load_state_dict(before.state["optimizer"])
        self._progress = before.progress
        self._whole = not before.consumed
        self._consumed = list(before.consumed) if self._peers.rank == 0 else []
        random = before.state["random"]
        self._seed_rank()
        if (
            len(random) == self._peers.size
        ):  # with another number of workers there is nothing to go on with
            mine = random[self._peers.rank]
            torch.set_rng_state(mine["cpu"].cpu())
            if self._device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"].cpu(), self._device)

    def run(self) -> None:
        """Train on all blocks; evaluate and checkpoint after each epoch.

        Raises:
            UsageError: the loss is no number any more, or labels make no sense.
        """
        try:
            self._run()
        finally:
            self._feed.close()

    def _run(self) -> None:
        self._model.train()
        epochs = self._training.learning.epochs
        while True:
            with self._clock.on("wait"), self._assignment.meter.wait():
                placed = self._feed.peek()
                batch = placed.batch if placed else None
                table = self._peers.gather(
                    *((batch.epoch, len(batch.good), len(batch.rows)) if batch else (epochs, 0, 0))
                )
            if not self._begun:  # until here actors were starting
                self._begun = True
                self._clock.start()
                self._epoch_begun = (time.perf_counter(), self._progress.images, self._clock.read())
                self._told = time.perf_counter()
            upcoming = int(table[:, 0].min())
            while self._progress.epoch < upcoming:
                self._end_epoch()
            if upcoming == epochs:
                return
            taking = table[table[:, 0] == upcoming]
            self._step(
                self._feed.take() if batch is not None and batch.epoch == upcoming else None,
                images=int(taking[:, 1].sum()),
                rows=int(taking[:, 2].sum()),
            )
            every = self._training.checkpoint_every
            if every is not None and self._progress.step % every == 0:
                self._checkpoint()
            self._tell_step()

    def _step(self, placed: Placed | None, *, images: int, rows: int) -> None:
        """Train on this rank's batch (None: it has none) of `images` that all ranks have together, of `rows` with rejected ones."""
        if images:
            with self._clock.on("step"), self._assignment.meter.call():
                self._optimize(placed, images)
        step = self._progress.step + 1
        self._progress = replace(
            self._progress,
            step=step,
            rows=self._progress.rows + rows,
            images=self._progress.images + images,
        )
        if placed is None:
            return
        good, taken = placed.batch.good, placed.batch.rows
        pixels = sum(row.pixels.nbytes for row in good if row.pixels is not None)
        self._assignment.meter.count(images=len(taken), bytes_in=pixels, bytes_out=0)
        self._new += [row.image_id for row in taken]
        self._rejects += [row.reject for row in taken if row.reject is not None]
        self._damaged += sum(row.damaged for row in taken)
        if placed.batch.epoch == 0:  # in later ones they are the same
            self._dropped += [box for row in taken for box in row.dropped]
            self._boxes_from.update(row.boxes_from for row in taken if row.boxes_from is not None)
        self._log.write(step, placed.batch)

    def _optimize(self, placed: Placed | None, images: int) -> None:
        training = self._training
        done = self._progress.rows / training.rows
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning.lr * lr_factor(
                done, schedule=training.learning.schedule, warmup=training.learning.warmup
            )
        mine: list[Tensor] = []
        targets: list[dict[str, Tensor]] = []
        if placed is not None:
            self._train_placer.take(placed)
            mine, targets = placed.images, placed.targets
            self._learned += sum(len(target["boxes"]) for target in targets)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
            loss = self._loss(mine, targets)
        # DDP averages over ranks; this makes it the mean over images.
        (loss * (len(mine) * self._peers.size / images)).backward()
        if training.learning.clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), training.learning.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._lost += loss.detach() * len(mine)
        self._images += len(mine)

    def _mean_loss(self) -> tuple[float, int]:
        """The sum of this epoch's losses over this rank's images, and their number."""
        lost = float(self._lost)
        if not math.isfinite(lost):
            raise UsageError(
                f"The loss became {lost} in epoch {self._progress.epoch}, by step {self._progress.step}: training diverged, and the weights are "
                f"lost since the last checkpoint. Lower --lr (it is {self._training.learning.lr:g}), lengthen --warmup or lower --clip."
            )
        return lost, self._images

    def _end_epoch(self) -> None:
        precision = None
        with self._clock.on("evaluate"):
            if self._assignment.holdout:
                precision = self._evaluate()
        lost = self._peers.collect(self._mean_loss())
        learned = int(self._peers.gather(self._learned).sum())
        if self._whole and not learned:
            raise UsageError(
                f"Epoch {self._progress.epoch} had no box to learn from: its images were rejected, or have no box left that is no crowd and "
                f"lies in the image after the recipe. Nothing was learned; rejects.parquet and boxes_dropped.parquet of "
                f"`jobs/preprocess.py --report` with the same input say why."
            )
        self._whole, self._learned = True, 0
        use = self._gpu.use()
        gpu = {"gpu_percent": use.percent, "gpu_memory_peak_bytes": use.memory_peak_bytes}
        clocks = self._peers.collect({**self._clock.read(), **gpu})
        begun, images_before, clock_before = self._epoch_begun
        took = time.perf_counter() - begun
        progress = self._progress
        record: dict[str, Any] = {}
        if self._peers.rank == 0:
            images = sum(count for _, count in lost)
            mine = clocks[0]
            record = {
                "epoch": progress.epoch,
                "step": progress.step,
                "loss": sum(loss for loss, _ in lost) / images if images else None,
                "map": precision.map if precision else None,
                "map50": precision.map50 if precision else None,
                "map75": precision.map75 if precision else None,
                "map_by_label": {str(k): v for k, v in precision.by_label.items()}
                if precision
                else None,
                "images": progress.images - images_before,
                "seconds": took,
                "images_per_s": (progress.images - images_before) / took,
                "wait_share": (mine["wait"] - clock_before["wait"]) / took,
            }
        self._progress = replace(
            progress,
            epoch=progress.epoch + 1,
            epochs=[*progress.epochs, record] if record else progress.epochs,
        )
        self._checkpoint(ended=progress.epoch)
        if record:
            self._assignment.board.tell(
                {
                    "kind": "epoch",
                    "began": self._clock.began,
                    "at": time.time(),
                    "rows": self._progress.rows,
                    "rejected": self._progress.rejected,
                    "workers": clocks,
                    **record,
                }
            )
        self._lost.zero_()
        self._images = 0
        self._epoch_begun = (time.perf_counter(), self._progress.images, self._clock.read())

    def _evaluate(self) -> Precision | None:
        self._peers.agree(
            self._model.buffers()
        )  # batch norms' running means differ; judged is what is kept, rank 0's
        found_and_true = evaluate(
            self._model,
            self._holdout,
            placer=self._placer,
            classes=self._training.classes,
            batch_size=self._share,
            amp=self._amp,
        )
        self._model.train()
        everybody = self._peers.collect(found_and_true)
        if not everybody:
            return None
        truths = [truth for pairs in everybody for truth, _ in pairs]
        return mean_average_precision(truths, [found for pairs in everybody for _, found in pairs])

    def _checkpoint(self, *, ended: int | None = None) -> None:
        """Keep all there is; together with all ranks. `ended`: an epoch is over, and its rows need not be known any more."""
        with self._clock.on("checkpoint"):
            self._mean_loss()  # raises rather than keep weights that are lost
            random = {"cpu": torch.get_rng_state()}
            if self._device.type == "cuda":
                random["cuda"] = torch.cuda.get_rng_state(self._device)
            everybody = self._peers.collect((self._new, self._rejects, random))
            told = self._peers.collect((self._dropped, self._boxes_from, self._damaged))
            self._new, self._rejects, self._dropped, self._boxes_from, self._damaged = (
                [],
                [],
                [],
                Counter(),
                0,
            )
            name = checkpoints.name_of(self._progress)
            if self._peers.rank == 0:
                self._consumed = (
                    []
                    if ended is not None
                    else self._consumed + [i for ids, _, _ in everybody for i in ids]
                )
                known = {row["image_id"] for row in self._progress.rejects}
                fresh = [
                    row
                    for _, rejects, _ in everybody
                    for row in rejects
                    if row["image_id"] not in known
                ]
                self._progress = replace(
                    self._progress,
                    rejects=[*self._progress.rejects, *fresh],
                    dropped=[
                        *self._progress.dropped,
                        *(box for boxes, _, _ in told for box in boxes),
                    ],
                    boxes_from=dict(
                        sum((kinds for _, kinds, _ in told), Counter(self._progress.boxes_from))
                    ),
                    damaged=self._progress.damaged + sum(damaged for _, _, damaged in told),
                )
                checkpoints.save(
                    str(Location.of(self._assignment.attempt) / name),
                    Checkpoint(
                        settings=self._assignment.settings,
                        progress=self._progress,
                        consumed=self._consumed,
                        state={
                            "model": self._model.state_dict(),
                            "optimizer": self._optimizer.state_dict(),
                            "random": [one for _, _, one in everybody],
                        },
                    ),
                )
            record = self._progress.epochs[-1] if self._progress.epochs else {}
            self._report(
                {"step": self._progress.step, "map": record.get("map")},
                name if self._peers.rank == 0 else None,
            )

    def _tell_step(self) -> None:
        now = time.perf_counter()
        if self._peers.rank or now - self._told < TELL_EVERY_S:
            return
        lost, images = self._mean_loss()
        begun, _, clock_before = self._epoch_begun
        self._assignment.board.tell(
            {
                "kind": "step",
                "began": self._clock.began,
                "at": time.time(),
                "epoch": self._progress.epoch,
                "step": self._progress.step,
                "rows": self._progress.rows,
                "rejected": self._progress.rejected,
                "loss": lost / images if images else None,
                "lr": self._optimizer.param_groups[0]["lr"],
                "images_per_s": (self._progress.images - self._told_images) / (now - self._told),
                "wait_share": (self._clock.read()["wait"] - clock_before["wait"]) / (now - begun),
            }
        )
        self._told, self._told_images = now, self._progress.images


def optimizer_for(model: nn.Module, learning: Learning) -> torch.optim.Optimizer:
    """The optimizer over all parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = learning.lr, learning.weight_decay
    if learning.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
    return torch.optim.SGD(trained, lr=lr, momentum=learning.momentum, weight_decay=decay)


class _RowLog:
    """Which rows each step trained on, a JSON line a step: the proof that none is missed or seen twice. `folder` is local."""

    def __init__(self, folder: str | None, attempt: str, rank: int):
        self._file = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = Location.of(attempt).name
            self._file = (Path(folder) / f"{name}-{rank}.jsonl").open("a", buffering=1)

    def write(self, step: int, batch: Batch) -> None:
        if self._file is not None:
            ids = [row.image_id for row in batch.rows]
            self._file.write(
                json.dumps({"step": step, "epoch": batch.epoch, "image_ids": ids}) + "\n"
            )


def work(assignment: Assignment) -> None:
    """Do it, in a worker of Ray Train."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    blocks: Iterable[pa.Table] = ()
    if assignment.has_rows:
        blocks = ray.train.get_dataset_shard("train").iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=2
        )
    storage = context.get_storage()

    def report(metrics: dict[str, Any], name: str | None) -> None:
        kept = None
        if name is not None:
            kept = ray.train.Checkpoint(
                f"{storage.experiment_fs_path}/{name}", filesystem=storage.storage_filesystem
            )
        ray.train.report(
            metrics, kept, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD
        )

    Worker(
        assignment,
        device=ray.train.torch.get_device(),
        peers=Peers(rank, size),
        blocks=blocks,
        holdout=[ray.get(ref) for ref in assignment.holdout[rank::size]],
        report=report,
    ).run()
