"""Does without Ray's helper actors in a Ray of one machine: each takes 0.9 to 1.5 s of CPU.

- The autoscaling coordinator divides a cluster that grows among datasets.
- The location tracker knows the node of each actor.
- The stats actor feeds the dashboard. It starts later, with what it was to be told until then.
- Ray Train's placement group cleaner frees the CPUs of a dead controller. It asks the dashboard
  about the controller. Without a dashboard, the end of a training waits 12 s for an answer.

Import this module only if `internals.missing("helpers")` is empty.
"""

import os
import threading
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import ray
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators import actor_pool_map_operator

_CHOSEN = "RAY_DATA_CLUSTER_AUTOSCALER"
"""Ray's variable with which a user chooses the cluster autoscaler."""


class _Fixed(ClusterAutoscaler):
    """The resources of one machine."""

    def __init__(self, *given: Any, **named: Any):
        self._total = ExecutionResources.from_resource_dict(ray.cluster_resources())

    def try_trigger_scaling(self) -> None:
        pass

    def on_executor_shutdown(self) -> None:
        pass

    def get_total_resources(self) -> ExecutionResources:
        return self._total


class _Method:
    """Looks like a method of an actor, and calls a function instead."""

    def __init__(self, call: Callable[..., None]):
        self.remote = call


def _ignore(*given: Any) -> None:
    pass


class _Here:
    """In place of the location tracker: all actors are on this node."""

    update_actor_location = _Method(_ignore)


class _Stats:
    """In place of the stats actor: keeps the calls until `pass_on`."""

    def __init__(self, create: Callable[[], Any]):
        self._create = create
        self._lock = threading.Lock()
        self._calls: list[tuple[str, tuple[Any, ...]]] | None = []

    def __call__(self) -> Any:
        return self if self._calls is not None else self._create()

    def __getattr__(self, name: str) -> _Method:
        return _Method(lambda *given: self._take(name, given))

    def _take(self, name: str, given: tuple[Any, ...]) -> None:
        with self._lock:
            if self._calls is not None:
                self._calls.append((name, given))
                return
        getattr(self._create(), name).remote(*given)

    def pass_on(self) -> None:
        """Start the actor, and tell it what it missed."""
        with self._lock:
            calls, self._calls = self._calls or [], None
        actor = self._create()
        for name, given in calls:
            getattr(actor, name).remote(*given)


class Helpers:
    """Ray Data and Ray Train without their helper actors, from now until `restore`."""

    def __init__(self, *, trains: bool) -> None:
        self._stats = _Stats(stats.get_or_create_stats_actor)
        here = ray.get_runtime_context().get_node_id()
        patches: list[tuple[Any, str, Any]] = [
            (stats, "get_or_create_stats_actor", self._stats),
            (
                stats._StatsManager,
                "gen_dataset_id_from_stats_actor",
                staticmethod(lambda: uuid4().hex),  # as Ray Data does where that actor fails
            ),
            (actor_pool_map_operator, "get_or_create_actor_location_tracker", _Here),
            (
                actor_pool_map_operator,
                "get_actor_locations",
                lambda actors: dict.fromkeys(actors, here),
            ),
        ]
        if trains:
            # Other runs do not import Ray Train.
            from ray.train.v2._internal.execution.callback import ControllerCallback
            from ray.train.v2.api import data_parallel_trainer

            nothing = (data_parallel_trainer, "PlacementGroupCleanerCallback", ControllerCallback)
            patches.append(nothing)
        if _CHOSEN not in os.environ:
            patches.append((streaming_executor, "create_cluster_autoscaler", _Fixed))
        self._before = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
        for owner, name, new in patches:
            setattr(owner, name, new)

    def start_stats(self) -> None:
        """Start the stats actor, for the dashboard's view of datasets."""
        self._stats.pass_on()

    def restore(self) -> None:
        """Let Ray be as it was."""
        for owner, name, old in self._before:
            setattr(owner, name, old)
