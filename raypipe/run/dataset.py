"""Puts stages on Ray Data. The only place that builds datasets."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from raypipe.data.work import shards
from raypipe.run.cluster import internals, placement
from raypipe.run.meter import Meter
from raypipe.stages.actor import TRIES, actor_class
from raypipe.stages.stage import Stage

START_AT_MOST_S = 600
"""Actors that are not ready by then never will be."""


@contextmanager
def together() -> Iterator[None]:
    """Make executions wait until all actors are ready, so that none works while others start."""
    context = DataContext.get_current()
    before = context.wait_for_min_actors_s
    context.wait_for_min_actors_s = START_AT_MOST_S
    try:
        yield
    finally:
        context.wait_for_min_actors_s = before


def dataset_of(
    work: pa.Table,
    stages: Sequence[Stage],
    counts: Mapping[str, int],
    *,
    threads: int = 1,
    cpus_each: float = 1.0,
    collector: ray.actor.ActorHandle | None = None,
    asks_as: str | None = None,
    places: bool = False,
) -> ray.data.Dataset:
    """Put `stages` on Ray Data.

    Args:
        work: rows (schema WORK); they are small.
        counts: actors of each stage.
        threads: how many OpenCV or torch may use within each actor.
        cpus_each: logical CPUs of an actor that holds no GPU.
        collector: gets the actors' measurements; None: they are not sent.
        asks_as: the id of the run, where it asks the cluster's autoscaler by itself.
        places: whether actors on CPUs are placed on nodes (`placement.options`).

    Returns:
        A dataset of the last stage's output. One shard is one block and one call of each stage.
        Nothing runs before it is consumed.
    """
    # Errors are raised and printed in a line (console.attempt). Ray Data would log the whole trace
    # twice. Importing it sets the level, so this comes after.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    tables = list(shards(work))
    # Not from_arrow: it runs a task for each table first, and Ray starts a process for each CPU.
    dataset = ray.data.from_blocks(tables)
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Who takes the blocks may pause for hours. Reads and images have limits of their own.
    context.execution_no_progress_timeout_s = -1
    # A shard stays one block, however large.
    context.target_max_block_size = 2**62
    # The actors measure their own memory. Ray Data would start a thread for it in every task.
    context.memory_usage_poll_interval_s = None
    actors = {stage.name: actor_class(stage) for stage in stages}
    if collector is not None and not internals.missing("scaling"):
        from raypipe.run.cluster.scaling import steer  # another Ray may lack what it imports

        operators = {f"MapBatches({kind.__name__})": name for name, kind in actors.items()}
        steer(context, collector=collector, stages=operators, asks_as=asks_as)
    # Ray 2.60 deprecates ray_remote_args of map_batches, but has no replacement yet.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*", category=RayDeprecationWarning)
    # Without a limit Ray repeats a dead actor's task for ever. Each image may kill it TRIES times.
    largest = max(table.num_rows for table in tables)
    again = {"max_restarts": -1, "max_task_retries": TRIES * largest}
    for stage in stages:
        on_gpu = bool(stage.gpu)
        resources: dict[str, Any] = {"num_cpus": cpus_each}
        if on_gpu:
            resources = {"num_gpus": 1, "num_cpus": 0}
        elif places:
            resources["ray_remote_args_fn"] = placement.options
        # map_batches refuses GPUs without a batch size; with one, Ray Data cuts and joins shards.
        map_batches = getattr(dataset, "map_batches_internal", dataset.map_batches)
        dataset = map_batches(
            actors[stage.name],
            fn_constructor_kwargs={
                "steps": stage.steps,
                "threads": threads,
                "gpu": on_gpu,
                "meter": Meter(stage=stage.name, collector=collector),
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=counts[stage.name], max_tasks_in_flight_per_actor=stage.in_flight
            ),
            **resources,
            **again,
        )
    return dataset
