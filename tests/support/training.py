"""The same training without Ray: one worker in this process, over the same blocks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from raypipe.data.reader import Reader
from raypipe.data.work import shards
from raypipe.images.recipe import for_evaluation
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint
from raypipe.stages.planning import Preprocessing
from raypipe.stages.preprocess import preprocess_shard
from raypipe.train.peers import Peers
from raypipe.train.plan import Assignment, plan
from raypipe.train.position import Position
from raypipe.train.settings import Settings
from raypipe.train.worker import Worker


class Quiet:
    """A meter and a board that send nothing. The board's records are kept."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def start(self, gpu: object = None) -> None: ...

    def call(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, **_: int) -> None: ...

    def tell(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def train_here(given: Settings, folder: Path) -> Checkpoint:
    """Train as `given` says, with checkpoints in `folder`, and return the last checkpoint."""
    todo = plan(given)
    segment = todo.epochs.next(Position(), ranks=1)

    def blocks(work: pa.Table, pixels: Preprocessing) -> list[pa.Table]:
        reader = Reader()
        return [preprocess_shard(shard, pixels, reader=reader)[0] for shard in shards(work)]

    judged = replace(todo.pixels, recipe=for_evaluation(todo.recipe), decode_only=False)
    holdout = blocks(todo.holdout, judged) if todo.holdout.num_rows else []
    assignment = Assignment(
        training=todo.training,
        settings=todo.deciding,
        attempt=str(folder),
        resume=None,
        segment=segment.without_rows(),
        holdout=holdout,
        board=Quiet(),
        meter=Quiet(),
    )
    Worker(
        assignment,
        device=torch.device("cpu"),
        peers=Peers(0, 1),
        blocks=blocks(segment.work, todo.pixels),
        holdout=holdout,
        report=lambda metrics, name: None,
    ).run()
    return checkpoints.load(checkpoints.all_in(str(folder))[-1])
