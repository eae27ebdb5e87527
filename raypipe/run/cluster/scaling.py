"""Observes and resizes Ray Data's actor pools from inside a running execution.

Ray has no public way to see how long a stage's actors were idle and why, or to resize a pool while
it runs. An execution callback runs in the executor's own thread after every scheduling step. Only
there its state is consistent. Import this module only if `internals.missing("scaling")` is empty.

Ray may have pools of another kind one day. The pool that is found decides: where its kind is not
known, nothing is resized, and the collector is told why.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import _ActorPool
from ray.data._internal.utils.cached_ray_internals import (
    get_draining_nodes,
    get_local_ongoing_lineage_reconstruction_tasks,
)

from raypipe.insight.states import Orders, PoolView
from raypipe.run.cluster.pools import Handle, Pool

_CONFIG = "raypipe.observe"

LOOK_EVERY_S = 0.1
SEND_EVERY_S = 0.5

GRACE_S = 3.0
"""A drained actor that still waits after this gives its CPU to a stage that has no actor. It cannot
finish before that stage takes its blocks."""

STUCK_S = 15.0
"""Where nothing has moved for so long and an actor waits for a CPU, an idle actor gives it one."""

TRY_EVERY_S = 1.0


def steer(
    context: DataContext,
    *,
    collector: ray.actor.ActorHandle,
    stages: dict[str, str],
    asks_as: str | None = None,
) -> None:
    """Report actor pools to `collector`, and apply the sizes it asks for.

    Args:
        context: of the dataset that will run.
        collector: gets `observe(pools)` twice a second and at the end; returns Orders.
        stages: operator name (Ray Data's, such as MapBatches(Preprocess)) -> stage name.
        asks_as: the id of the run, where it asks the cluster's autoscaler by itself.
    """
    context.set_config(_CONFIG, (collector, stages, asks_as))
    context.custom_execution_callback_classes.append(_Steering)


class _Steering(ExecutionCallback):
    def __init__(self) -> None:
        self._views: dict[str, PoolView] = {}
        self._pools: dict[str, Pool] = {}
        self._orders: Orders | None = None
        self._foreign = False
        self._seen: float | None = None
        self._sent = 0.0
        self._answer: ray.ObjectRef | None = None
        self._moved: tuple[float, object] = (0.0, None)
        self._tried = 0.0

    def before_execution_starts(self, executor) -> None:
        *_, asks_as = executor._data_context.get_config(_CONFIG)
        if asks_as is not None:
            from raypipe.run.cluster.asking import Asked  # another Ray may lack what it imports

            executor._cluster_autoscaler = Asked(asks_as, executor._cluster_autoscaler)

    def on_execution_step(self, executor) -> None:
        now = time.perf_counter()
        if self._seen is None:
            # The time before the first step is not work: it may be a wait for all actors.
            self._seen = self._sent = now
        if now - self._seen < LOOK_EVERY_S:
            return
        self._look(executor, now - self._seen)
        self._seen = now
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._apply(self._answer)
            self._answer = None
        # One request at a time, so that none pile up if the collector is slow or gone.
        if self._answer is None and now - self._sent >= SEND_EVERY_S:
            self._answer = self._send(executor)
            self._sent = now

    def after_execution_succeeds(self, executor) -> None:
        self._send(executor)

    def after_execution_fails(self, executor, error: Exception) -> None:
        self._send(executor)

    def _send(self, executor) -> ray.ObjectRef:
        collector, *_ = executor._data_context.get_config(_CONFIG)
        return collector.observe.remote(self._views)

    def _apply(self, answer: ray.ObjectRef) -> None:
        try:
            self._orders = ray.get(answer)
        except ray.exceptions.RayError:  # the run goes on without its collector
            self._orders = None
            return
        for stage, pool in self._pools.items():
            if stage in self._orders.counts:
                pool.want(self._orders.counts[stage])

    def _look(self, executor, elapsed: float) -> None:
        leaving = get_draining_nodes()
        for operator, state, stage in self._stages(executor):
            if operator.has_completed():
                self._pools.pop(stage, None)
                if stage in self._views:
                    self._views[stage] = replace(
                        self._views[stage], running=0, pending=0, draining=0, queued=0, done=True
                    )
                continue
            queued = state.total_enqueued_input_blocks()
            for of_ray in operator.get_autoscaling_actor_pools():
                if stage not in self._pools and self._knows(of_ray, executor):
                    self._pools[stage] = Pool(of_ray)
                if stage in self._pools:
                    pool, ending = self._pools[stage], operator._inputs_complete and not queued
                    pool.look(leaving, ending=ending)
                    self._views[stage] = pool.view(self._views.get(stage), queued, elapsed)
        self._unblock(executor)

    def _stages(self, executor) -> Iterator[tuple[Any, Any, str]]:
        """The operators of stages, their states, and the names of the stages."""
        _, stages, _ = executor._data_context.get_config(_CONFIG)
        for operator, state in executor._topology.items():
            if operator.name in stages:
                yield operator, state, stages[operator.name]

    def _knows(self, of_ray: Any, executor) -> bool:
        """Whether the pool is of the kind that raypipe resizes. If not, the collector is told."""
        if isinstance(of_ray, _ActorPool):
            return True
        if not self._foreign:
            self._foreign = True
            collector, *_ = executor._data_context.get_config(_CONFIG)
            collector.cannot_scale.remote(
                f"live scaling is off: the actor pools of this Ray ({ray.__version__}) are of the "
                f"kind {type(of_ray).__name__}, which raypipe does not know. All else works"
            )
        return False

    # --- actors that wait for the CPUs of actors that wait for them -----------------------------

    def _unblock(self, executor) -> None:
        """Have idle actors give their CPUs to those that wait, where nothing would move otherwise.

        When a node is lost, Ray starts its actors again as soon as CPUs are free. Those of the
        first stage may have all of them, and wait for room for what they made: that of the last
        stage, whose actors wait for a CPU. An actor that is started again does its tasks again.
        """
        now = time.monotonic()
        moved = [
            (operator.metrics.num_tasks_finished, operator.metrics.num_outputs_taken)
            for operator, *_ in self._stages(executor)
        ]
        if moved != self._moved[1]:
            self._moved = now, moved
        if self._orders is None or not self._pools or now - self._tried < TRY_EVERY_S:
            return
        if any(not pool.alive for pool in self._pools.values()):
            drained = [pool.drained_since(now - GRACE_S) for pool in self._pools.values()]
            if self._give_up(now, [actor for actors in drained for actor in actors]):
                return
        if now - self._moved[0] < STUCK_S:
            return
        waiting = any(pool.waiting for pool in self._pools.values())
        if waiting or get_local_ongoing_lineage_reconstruction_tasks():
            most = max(self._pools.values(), key=lambda pool: len(pool.alive))
            if self._give_up(now, most.alive[-1:]):
                self._moved = now, moved

    def _give_up(self, now: float, actors: list[Handle]) -> bool:
        """Start those of `actors` again that do nothing, unless a CPU is free as it is."""
        assert self._orders is not None
        idle = [a for a in actors if a._actor_id.hex() not in self._orders.at_work]
        self._tried = now if idle else self._tried
        if not idle or ray.available_resources().get("CPU", 0.0) >= 1:
            return False
        for actor in idle:
            ray.kill(actor, no_restart=False)
        return True
