"""One of Ray Data's actor pools: it can shrink under load, and follows nodes that come and go.

Import this module only if `internals.missing("scaling")` is empty.
"""

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any, TypeAlias

import ray
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolScalingRequest
from ray.data._internal.execution.operators.actor_pool_map_operator import _ActorPool

from raypipe.insight.states import PoolView

Handle: TypeAlias = ray.actor.ActorHandle


class Pool:
    """An actor pool with a wanted count.

    Ray releases only idle actors. A saturated pool has none, because dispatch precedes autoscaling.
    So excess actors drain: they leave the dispatch heaps as dead actors do, finish their tasks, and
    are released. A busy actor is never released, as its task would be done again.
    """

    def __init__(self, of_ray: _ActorPool):
        self._of_ray = of_ray
        self._count = of_ray.min_size()  # pools begin with a fixed size
        self._draining: dict[Handle, float] = {}  # since when
        self._rank = of_ray._update_rank
        # refresh_actor_state calls it for every actor, before every dispatch.
        of_ray._update_rank = self._update_rank

    def _update_rank(self, actor: Handle, state: Any, died: bool) -> None:
        self._rank(actor=actor, state=state, died=died or actor in self._draining)

    @property
    def alive(self) -> list[Handle]:
        """Actors that have a process, on a node that is there."""
        there = self._of_ray._running_actors.items()
        return [actor for actor, state in there if not state.is_restarting]

    @property
    def waiting(self) -> int:
        """Actors that wait for a CPU, or start."""
        return self._of_ray.num_pending_actors() + self._of_ray.num_restarting_actors()

    def drained_since(self, before: float) -> list[Handle]:
        """Actors with a process that have drained since `before` and are not done."""
        return [actor for actor in self.alive if self._draining.get(actor, before) < before]

    def want(self, count: int) -> None:
        """Start or drain actors until there are `count`.

        The same count again does nothing: the actors that Ray releases at the end of the input must
        not start again.
        """
        if count == self._count:
            return
        pool = self._of_ray
        self._count = count
        while pool.current_size() > count and pool._try_remove_pending_actor():
            pass
        self._start(count - pool.current_size())
        self._settle(())

    def look(self, leaving: Collection[str], *, ending: bool) -> None:
        """Release drained actors, and replace those on nodes that will go.

        Args:
            leaving: ids of these nodes.
            ending: all input has been handed out, so nothing needs more actors.
        """
        if leaving and not ending:
            states = self._of_ray._running_actors.values()
            going = sum(state.actor_location in leaving for state in states)
            self._start(self._count - (self._of_ray.current_size() - going))
        self._settle(leaving)

    def _start(self, count: int) -> None:
        if count > 0:
            request = ActorPoolScalingRequest.upscale(delta=count, reason="asked for")
            self._of_ray.scale(request)

    def _settle(self, leaving: Collection[str]) -> None:
        """Choose the actors that drain, and release those that are done.

        First go actors on nodes that leave, and actors that wait for a CPU without a task. Actors
        that wait with tasks stay: nobody else can do these, and others make room for them.
        """
        pool = self._of_ray
        excess = max(pool.current_size() - self._count, 0)

        def order(item: tuple[Handle, Any]) -> tuple[int, int]:
            state = item[1]
            if state.actor_location in leaving and not state.is_restarting:
                return 0, 0
            tasks = state.num_tasks_in_flight
            return (3 if tasks else 1) if state.is_restarting else 2, tasks

        items = sorted(pool._running_actors.items(), key=order)[:excess] if excess else []
        chosen = [actor for actor, _ in items]
        if chosen or self._draining:
            now = time.monotonic()
            before = self._draining
            self._draining = {actor: before.get(actor, now) for actor in chosen}
            if before.keys() != self._draining.keys():
                pool.refresh_actor_state()
        for actor in list(self._draining):
            if not pool._running_actors[actor].num_tasks_in_flight:
                pool._release_running_actor(actor)
                del self._draining[actor]
        # Ray's autoscaler replaces lost actors, and would release idle ones that should stay.
        size = self._count + len(self._draining)
        if (pool._config.min_size, pool._config.max_size) != (size, size):
            pool._config = replace(pool._config, min_size=size, max_size=size, initial_size=size)

    def view(self, before: PoolView | None, queued: int, elapsed: float) -> PoolView:
        """How the pool is now.

        Args:
            before: the view before; None: this is the first.
            queued: blocks that wait for the stage.
            elapsed: seconds since the view before.
        """
        pool, draining = self._of_ray, len(self._draining)
        running = len(self.alive)
        # Idle while input waits: blocked by the next stage. Idle otherwise: starved.
        idle = max(running - pool.num_active_actors(), 0)
        there = pool.current_size() - draining
        view = before or PoolView(start=there, min=there, max=there)
        # Shrinking at the end of the input is not scaling: Ray releases idle actors.
        return replace(
            view,
            min=min(view.min, there) if queued else view.min,
            max=max(view.max, there),
            end=there if queued else view.end or there,
            running=running,
            pending=self.waiting,
            draining=draining,
            queued=queued,
            actor_s=view.actor_s + running * elapsed,
            starved_s=view.starved_s + (0.0 if queued else idle * elapsed),
        )
