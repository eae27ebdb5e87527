"""The train stage: blocks of pixels in, a trained model out. Each Ray Train worker calls `work`.

A step is one batch over all workers (`steps.py`). Ranks may have different numbers of rows: one
without rows takes part with an empty batch. Nobody waits for ever, and no row is dropped to make
the numbers even. The gradient is that of the mean over all images of the step, whichever rank had
them.

A thread prepares the next batches while the model trains on this one. It copies them from pinned
memory on a stream of its own, and finishes them there (float, normalised, padded).
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raypipe.data.batches import Batch
from raypipe.data.location import Location
from raypipe.errors import UsageError
from raypipe.models import checkpoint as checkpoints
from raypipe.models import detection
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.models.evaluate import Precision, mean_average_precision
from raypipe.models.placer import Placed, Placer, evaluate, uses_bf16
from raypipe.stages.gpu import GpuMeter
from raypipe.train.clock import Clock, lr_factor
from raypipe.train.feed import Feed
from raypipe.train.loss import Loss, optimizer_for
from raypipe.train.peers import Peers
from raypipe.train.plan import Assignment
from raypipe.train.position import Position, from_states, to_state
from raypipe.train.seen import RowLog, Seen, add_seen
from raypipe.train.steps import Step

TELL_EVERY_S = 1.0


class Worker:
    """One rank. `run` trains to the end.

    Args:
        blocks: to train on (schema BLOCK).
        holdout: this rank's share of the blocks to judge on.
        report: called by all ranks together at each checkpoint, with figures and its name.
    """

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
        self._model = self._built()
        self._optimizer = optimizer_for(self._model, training.learning)
        self._progress = Progress(dropped=list(assignment.dropped))
        self._position = Position()
        # What became of rows since the last checkpoint, on rank 0 of all ranks.
        self._seen: list[Seen] = []
        # Whether this attempt has seen the whole epoch, and the boxes this rank has learned from.
        self._whole, self._learned = True, 0
        if assignment.resume is None:
            self._seed_rank()
        else:
            self._restore(checkpoints.load(assignment.resume, trusted=training.trust))
        self._loss = self._with_loss()
        finish, classes, batch_size = (
            training.finish,
            training.classes,
            training.learning.batch_size,
        )
        self._train_placer = Placer(device, finish, classes, left=training.left, seed=training.seed)
        # Without ops: the actors have done them all for the images to judge on.
        self._placer = Placer(device, finish, classes)
        share = batch_size // peers.size + (peers.rank < batch_size % peers.size)
        self._share = max(share, 1)
        # A group of its own: its thread exchanges while this one does.
        feeding = Peers(peers.rank, peers.size)
        taken = assignment.segment.steps(blocks, size=self._share, peers=feeding, joins=False)
        self._feed = Feed(taken, self._placed, device)
        self._amp = uses_bf16(training.learning.amp, device)
        self._gpu = GpuMeter(device)
        assignment.meter.start(self._gpu)
        self._clock = Clock(device)
        self._begun = False
        self._log = RowLog(assignment.row_log, assignment.attempt, peers.rank)
        # The sum of the losses over this rank's images of this epoch, and their number.
        self._lost = torch.zeros((), device=device)
        self._images = 0
        self._start_epoch()
        self._told = time.perf_counter()
        self._told_images = self._progress.images

    def _placed(self, step: Step) -> tuple[Step, Placed]:
        """A step and its batch on the device."""
        return step, self._train_placer(Batch(epoch=step.epoch, rows=step.rows))

    def _built(self) -> nn.Module:
        """The model on the device, with random weights."""
        training = self._training
        model = detection.build(
            training.model.model,
            num_classes=len(training.classes) + 1,
            arguments=training.model.arguments,
        ).to(self._device)
        if self._device.type == "cuda":
            return model.to(memory_format=torch.channels_last)
        return model

    def _with_loss(self) -> nn.Module:
        """The model and its loss; with several ranks, in DDP."""
        if self._training.compile:
            # The backbone is nearly all of the arithmetic. The shapes in the rest of a detection
            # model differ from image to image.
            getattr(self._model, "backbone", self._model).compile()
        loss = Loss(self._model)
        if self._peers.size == 1:
            return loss
        return DistributedDataParallel(
            loss, device_ids=[self._device] if self._device.type == "cuda" else None
        )

    def _seed_rank(self) -> None:
        key = np.random.SeedSequence(
            [self._training.seed, self._peers.rank, self._progress.step]
        ).generate_state(1, np.uint64)
        torch.manual_seed(int(key[0] >> np.uint64(1)))

    def _restore(self, before: Checkpoint) -> None:
        self._model.load_state_dict(before.state["model"])
        self._optimizer.load_state_dict(before.state["optimizer"])
        self._progress = before.progress
        self._position = from_states(before.seen, self._training.decides)
        self._whole = self._position == Position(epoch=self._progress.epoch)
        random = before.state["random"]
        self._seed_rank()
        # With another number of workers, no saved random state fits.
        if len(random) == self._peers.size:
            mine = random[self._peers.rank]
            torch.set_rng_state(mine["cpu"].cpu())
            if self._device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"].cpu(), self._device)

    def run(self) -> None:
        """Train on all blocks; evaluate and checkpoint after each epoch.

        Raises:
            UsageError: the loss is not finite, or labels make no sense.
        """
        try:
            self._run()
        finally:
            self._feed.close()

    def _run(self) -> None:
        self._model.train()
        while True:
            with self._clock.on("wait"), self._assignment.meter.wait():
                item = self._feed.peek()
            if not self._begun:  # preprocess actors were starting until now
                self._begun = True
                self._clock.start()
                self._start_epoch()
                self._told = time.perf_counter()
            upcoming = self._assignment.segment.epochs.stop if item is None else item[0].epoch
            while self._progress.epoch < upcoming:
                self._end_epoch()
            if item is None:
                return
            self._step(*self._feed.take())
            every = self._training.checkpoint_every
            if every is not None and self._progress.step % every == 0:
                self._checkpoint()
            self._tell_step()

    def _start_epoch(self) -> None:
        self._epoch_begun = (time.perf_counter(), self._progress.images, self._clock.read())

    def _step(self, step: Step, placed: Placed) -> None:
        """Train on this rank's batch, which may be empty."""
        if step.images_of_all:
            with self._clock.on("step"), self._assignment.meter.call():
                self._optimize(placed, step.images_of_all)
        before = self._progress
        self._progress = replace(
            before,
            step=before.step + 1,
            rows=before.rows + step.rows_of_all,
            images=before.images + step.images_of_all,
        )
        self._position = self._position.after(step.ranges, ends=step.ends)
        if self._peers.rank == 0:
            self._seen += step.seen
        if not step.rows:
            return
        pixels = sum(row.pixels.nbytes for row in step.rows if row.pixels is not None)
        self._assignment.meter.count(images=len(step.rows), bytes_in=pixels, bytes_out=0)
        self._log.write(self._progress.step, placed.batch)

    def _optimize(self, placed: Placed, images: int) -> None:
        training = self._training
        done = self._progress.rows / training.rows
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning.lr * lr_factor(
                done, schedule=training.learning.schedule, warmup=training.learning.warmup
            )
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

    def _losses(self) -> tuple[float, int]:
        """The sum of this epoch's losses over this rank's images, and their number.

        Raises:
            UsageError: the sum is not finite.
        """
        lost = float(self._lost)
        if not math.isfinite(lost):
            raise UsageError(
                f"The loss became {lost} in epoch {self._progress.epoch}, by step "
                f"{self._progress.step}: training diverged, and the weights are lost since the "
                f"last checkpoint. Lower --lr (it is {self._training.learning.lr:g}), lengthen "
                f"--warmup or lower --clip."
            )
        return lost, self._images

    def _end_epoch(self) -> None:
        precision = None
        with self._clock.on("evaluate"):
            if self._assignment.holdout:
                precision = self._evaluate()
        lost = self._peers.collect(self._losses())
        self._check_learned()
        use = self._gpu.use()
        gpu = {"gpu_percent": use.percent, "gpu_memory_peak_bytes": use.memory_peak_bytes}
        clocks = self._peers.collect({**self._clock.read(), **gpu})
        record = self._epoch_record(lost, clocks[0], precision) if self._peers.rank == 0 else {}
        ended = self._progress
        self._progress = replace(
            ended,
            epoch=ended.epoch + 1,
            epochs=[*ended.epochs, record] if record else ended.epochs,
        )
        self._checkpoint()
        if record:
            self._tell("epoch", workers=clocks, **record)
        self._lost.zero_()
        self._images = 0
        self._start_epoch()

    def _check_learned(self) -> None:
        """Raise UsageError if no rank has learned from a box in the whole epoch."""
        learned = int(self._peers.gather(self._learned).sum())
        if self._whole and not learned:
            raise UsageError(
                f"Epoch {self._progress.epoch} had no box to learn from: its images were rejected, "
                f"or have no box left that lies in the image after the recipe. "
                f"Nothing was learned; rejects.parquet and boxes_dropped.parquet of "
                f"`jobs/preprocess.py --report` with the same input say why."
            )
        self._whole, self._learned = True, 0

    def _epoch_record(
        self, lost: list[tuple[float, int]], clock: dict[str, Any], precision: Precision | None
    ) -> dict[str, Any]:
        """The figures of the epoch that has ended.

        Args:
            lost: each rank's sum of losses, and number of images.
            clock: rank 0's.
        """
        begun, images_before, clock_before = self._epoch_begun
        took = time.perf_counter() - begun
        progress, images = self._progress, sum(count for _, count in lost)
        by_label = precision and {str(k): v for k, v in precision.by_label.items()}
        return {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": sum(loss for loss, _ in lost) / images if images else None,
            "map": precision.map if precision else None,
            "map50": precision.map50 if precision else None,
            "map75": precision.map75 if precision else None,
            "map_by_label": by_label,
            "images": progress.images - images_before,
            "seconds": took,
            "images_per_s": (progress.images - images_before) / took,
            "wait_share": (clock["wait"] - clock_before["wait"]) / took,
        }

    def _evaluate(self) -> Precision | None:
        # The running means of batch norms differ by rank. Rank 0's are kept, so they are judged.
        self._peers.agree(self._model.buffers())
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

    def _checkpoint(self) -> None:
        """Write a checkpoint, together with all ranks."""
        with self._clock.on("checkpoint"):
            self._losses()  # raises rather than keep weights that are lost
            random = {"cpu": torch.get_rng_state()}
            if self._device.type == "cuda":
                random["cuda"] = torch.cuda.get_rng_state(self._device)
            everybody = self._peers.collect(random)
            name = checkpoints.name_of(self._progress)
            if self._peers.rank == 0:
                self._progress = add_seen(self._progress, self._seen)
                self._seen = []
                self._save(name, everybody)
            record = self._progress.epochs[-1] if self._progress.epochs else {}
            self._report(
                {"step": self._progress.step, "map": record.get("map")},
                name if self._peers.rank == 0 else None,
            )

    def _save(self, name: str, random: list[dict[str, Tensor]]) -> None:
        checkpoints.save(
            str(Location.of(self._assignment.attempt) / name),
            Checkpoint(
                settings=self._assignment.settings,
                progress=self._progress,
                seen=to_state(self._position, self._training.decides),
                state={
                    "model": self._model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "random": random,
                },
            ),
        )

    def _tell_step(self) -> None:
        now = time.perf_counter()
        if self._peers.rank or now - self._told < TELL_EVERY_S:
            return
        lost, images = self._losses()
        begun, _, clock_before = self._epoch_begun
        self._tell(
            "step",
            epoch=self._progress.epoch,
            step=self._progress.step,
            loss=lost / images if images else None,
            lr=self._optimizer.param_groups[0]["lr"],
            images_per_s=(self._progress.images - self._told_images) / (now - self._told),
            wait_share=(self._clock.read()["wait"] - clock_before["wait"]) / (now - begun),
        )
        self._told, self._told_images = now, self._progress.images

    def _tell(self, kind: str, **figures: Any) -> None:
        """Put a record on the board."""
        self._assignment.board.tell(
            {
                "kind": kind,
                "began": self._clock.began,
                "at": time.time(),
                "rows": self._progress.rows,
                "rejected": self._progress.rejected,
                **figures,
            }
        )


def work(assignment: Assignment) -> None:
    """Train as `assignment` says, in a worker of Ray Train."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    blocks: Iterable[pa.Table] = ()
    if assignment.segment.left:
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
    # Ray Train ends this process as soon as it sees that this function has returned.
    assignment.meter.flush()
    assignment.board.flush()
