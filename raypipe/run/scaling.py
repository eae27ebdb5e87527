"""Ray Data's actor pools, seen from inside a running execution. THE ONLY FILE THAT TOUCHES RAY'S INTERNALS.

Ray has no public way to see how long a stage's actors had nothing to do, and why. An execution callback runs in the executor's own
thread after every scheduling step, which is the only place where its state is consistent. Written against Ray 2.60
(ray/data/_internal/execution/execution_callback.py, streaming_executor_state.py, operators/actor_pool_map_operator.py).
"""

import time
from dataclasses import replace

import ray
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from raypipe.insight.report import PoolView

_CONFIG = "raypipe.observe"

OBSERVE_EVERY_S = 0.1
SEND_EVERY_S = 1.0


def observe(context: DataContext, *, collector: ray.actor.ActorHandle, stages: dict[str, str]) -> None:
    """Have executions under `context` tell `collector` of their actor pools.

    Args:
        context: of the dataset that is about to run.
        collector: gets `observe(pools)` once a second and at the end.
        stages: operator name (Ray Data's, such as MapBatches(Preprocess)) -> stage name.
    """
    context.set_config(_CONFIG, (collector, stages))
    context.custom_execution_callback_classes.append(_Observer)


class _Observer(ExecutionCallback):
    def __init__(self) -> None:
        self._pools: dict[str, PoolView] = {}
        self._seen = self._sent = time.perf_counter()

    def on_execution_step(self, executor) -> None:
        now = time.perf_counter()
        if now - self._seen < OBSERVE_EVERY_S:
            return
        self._look(executor, now - self._seen)
        self._seen = now
        if now - self._sent >= SEND_EVERY_S:
            self._send(executor)
            self._sent = now

    def after_execution_succeeds(self, executor) -> None:
        self._send(executor)

    def after_execution_fails(self, executor, error: Exception) -> None:
        self._send(executor)

    def _send(self, executor) -> None:
        collector, _ = executor._data_context.get_config(_CONFIG)
        collector.observe.remote(self._pools)

    def _look(self, executor, elapsed: float) -> None:
        _, stages = executor._data_context.get_config(_CONFIG)
        for operator, state in executor._topology.items():
            stage = stages.get(operator.name)
            if stage is None or operator.has_completed():
                continue
            for pool in operator.get_autoscaling_actor_pools():
                running = pool.num_running_actors()
                queued = state.total_enqueued_input_blocks()
                # An actor without a task while input waits is held back by those behind it; else it has nothing to do.
                idle = max(running - pool.num_active_actors(), 0)
                wanted = running + pool.num_pending_actors()
                view = self._pools.get(stage) or PoolView(start=wanted, min=wanted, max=wanted)
                # Shrinking at the end of the input is no scaling: Ray releases actors that have nothing left to do.
                self._pools[stage] = replace(
                    view,
                    min=min(view.min, wanted) if queued else view.min,
                    max=max(view.max, wanted),
                    end=wanted if queued else view.end or wanted,
                    queued=queued,
                    actor_s=view.actor_s + running * elapsed,
                    starved_s=view.starved_s + (0.0 if queued else idle * elapsed),
                )
