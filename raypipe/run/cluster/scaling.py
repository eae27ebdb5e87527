"""Observes and resizes Ray Data's actor pools from inside a running execution.

Ray has no public way to see how long a stage's actors were idle and why, or to resize a pool while
it runs. An execution callback runs in the executor's own thread after every scheduling step. Only
there its state is consistent. Import this module only if `internals.missing("scaling")` is empty.
"""

import time
from dataclasses import replace
from typing import Any

import ray
from ray.data import DataContext
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolScalingRequest
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import _ActorPool

from raypipe.insight.states import PoolView

_CONFIG = "raypipe.observe"

LOOK_EVERY_S = 0.1
SEND_EVERY_S = 0.5


def steer(
    context: DataContext, *, collector: ray.actor.ActorHandle, stages: dict[str, str]
) -> None:
    """Report actor pools to `collector`, and apply the sizes it asks for.

    Args:
        context: of the dataset that will run.
        collector: gets `observe(pools)` twice a second and at the end; returns {stage: count}.
        stages: operator name (Ray Data's, such as MapBatches(Preprocess)) -> stage name.
    """
    context.set_config(_CONFIG, (collector, stages))
    context.custom_execution_callback_classes.append(_Steering)


class _Steering(ExecutionCallback):
    def __init__(self) -> None:
        self._views: dict[str, PoolView] = {}
        self._pools: dict[str, _Pool] = {}
        self._seen: float | None = None
        self._sent = 0.0
        self._answer: ray.ObjectRef | None = None

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
        collector, _ = executor._data_context.get_config(_CONFIG)
        return collector.observe.remote(self._views)

    def _apply(self, answer: ray.ObjectRef) -> None:
        try:
            wanted = ray.get(answer)
        except ray.exceptions.RayError:  # the run goes on without its collector
            return
        for stage, pool in self._pools.items():
            if stage in wanted:
                pool.want(wanted[stage])

    def _look(self, executor, elapsed: float) -> None:
        _, stages = executor._data_context.get_config(_CONFIG)
        for operator, state in executor._topology.items():
            stage = stages.get(operator.name)
            if stage is None:
                continue
            if operator.has_completed():
                if stage in self._views:
                    self._views[stage] = replace(
                        self._views[stage], running=0, pending=0, draining=0, queued=0, done=True
                    )
                continue
            for of_ray in operator.get_autoscaling_actor_pools():
                if stage not in self._pools:
                    self._pools[stage] = _Pool(of_ray)
                pool = self._pools[stage]
                pool.release_drained()
                running = of_ray.num_running_actors()
                queued = state.total_enqueued_input_blocks()
                # Idle while input waits: blocked by the next stage. Idle otherwise: starved.
                idle = max(running - of_ray.num_active_actors(), 0)
                there = running + of_ray.num_pending_actors() - len(pool.draining)
                view = self._views.get(stage) or PoolView(start=there, min=there, max=there)
                # Shrinking at the end of the input is not scaling: Ray releases idle actors.
                self._views[stage] = replace(
                    view,
                    min=min(view.min, there) if queued else view.min,
                    max=max(view.max, there),
                    end=there if queued else view.end or there,
                    running=running,
                    pending=of_ray.num_pending_actors(),
                    draining=len(pool.draining),
                    queued=queued,
                    actor_s=view.actor_s + running * elapsed,
                    starved_s=view.starved_s + (0.0 if queued else idle * elapsed),
                )


class _Pool:
    """One of Ray Data's actor pools, which can shrink under load too.

    Ray releases only idle actors. A saturated pool has none, because dispatch precedes autoscaling.
    So excess actors drain: they leave the dispatch heaps as dead actors do, finish their tasks, and
    are released. A busy actor is never released, as its task would be done again.
    """

    def __init__(self, of_ray: _ActorPool):
        self._of_ray = of_ray
        self._count = of_ray.min_size()  # pools begin with a fixed size
        self.draining: set[ray.actor.ActorHandle] = set()
        self._rank = of_ray._update_rank
        # refresh_actor_state calls it for every actor, before every dispatch.
        of_ray._update_rank = self._update_rank

    def _update_rank(self, actor: ray.actor.ActorHandle, state: Any, died: bool) -> None:
        self._rank(actor=actor, state=state, died=died or actor in self.draining)

    def want(self, count: int) -> None:
        """Start or drain actors until there are `count`.

        The same count again does nothing: the actors that Ray releases at the end of the input must
        not start again.
        """
        if count == self._count:
            return
        pool = self._of_ray
        self._count = count
        self.draining &= pool._running_actors.keys()
        excess = pool.current_size() - len(self.draining) - count
        while excess < 0 and self.draining:
            self.draining.pop()
            excess += 1
        if excess < 0:
            pool.scale(ActorPoolScalingRequest.upscale(delta=-excess, reason="asked for"))
        while excess > 0 and pool._try_remove_pending_actor():
            excess -= 1
        if excess > 0:
            # The actors with the fewest tasks go first.
            running = sorted(
                pool._running_actors.items(), key=lambda item: item[1].num_tasks_in_flight
            )
            free = [actor for actor, _ in running if actor not in self.draining]
            self.draining.update(free[:excess])
        pool.refresh_actor_state()
        self.release_drained()

    def release_drained(self) -> None:
        """Release drained actors, and adapt the bounds of Ray's autoscaler.

        The autoscaler replaces lost actors. If its bounds left out the draining actors, it would
        release an idle actor that should stay.
        """
        for actor in list(self.draining):
            state = self._of_ray._running_actors.get(actor)
            if state is None:
                self.draining.discard(actor)
            elif not state.num_tasks_in_flight:
                self._of_ray._release_running_actor(actor)
                self.draining.discard(actor)
        config, most = self._of_ray._config, self._count + len(self.draining)
        if (config.min_size, config.max_size) != (self._count, most):
            self._of_ray._config = replace(
                config, min_size=self._count, max_size=most, initial_size=self._count
            )
