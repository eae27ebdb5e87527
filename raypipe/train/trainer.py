"""One attempt by Ray Train: its trainer, and how it is run."""

import os
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.data import Dataset
from ray.train.torch import TorchTrainer

from raypipe.data.location import Location
from raypipe.train.board import Uneven, train
from raypipe.train.plan import Assignment
from raypipe.train.settings import Workers

# Ray Train fetches reports when it polls, and a worker can hold only one. With Ray's interval of
# 2 s, shorter epochs would wait. Ray Train passes this variable to all its processes.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def trainer_of(
    assignment: Assignment,
    blocks: Dataset | None,
    *,
    name: str,
    storage: Location,
    workers: Workers,
    on_gpu: bool,
) -> TorchTrainer:
    """Ray Train's trainer of one attempt, which is never repeated.

    Args:
        blocks: to train on (schema BLOCK), in their order; None: no row is left.
        name: of the attempt; its checkpoints are in a folder of this name.
        on_gpu: a GPU for each worker, else a CPU.
    """
    datasets = {}
    if blocks is not None:
        # So that epochs come one after the other, and runs are reproducible.
        blocks.context.execution_options.preserve_order = True
        datasets["train"] = blocks
    where: dict[str, Any] = {"storage_path": storage.uri}
    if storage.is_remote:
        system, path = storage.filesystem()
        where = {"storage_filesystem": system, "storage_path": path}
    return TorchTrainer(
        train,
        # By reference: otherwise the processes that hand it on would load torch to read it.
        train_loop_config={"assignment": ray.put(assignment)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.workers,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1, "CPU": 0} if on_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **where,
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=workers.keep),
        ),
        datasets=datasets,
        dataset_config=Uneven(),
    )


def fit(trainer: TorchTrainer, check: Callable[[], None]) -> None:
    """Run trainer.fit() in a thread: in the main thread it would catch Ctrl-C itself.

    Args:
        check: called meanwhile. If it raises, waiting ends.

    Raises:
        ray.train.TrainingFailedError: a worker died or raised.
    """
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True, name="raypipe-fit")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        check()
    if ended and ended[0] is not None:
        raise ended[0]
