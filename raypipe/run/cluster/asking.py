"""Asks the cluster's autoscaler for what a run wants, and withdraws it at the end.

The autoscaler knows one request for the whole cluster. Ray Data's coordinator, an actor, adds up
those of all who ask it, and divides what is there among them. Import this module only if
`internals.missing("autoscaling")` is empty: it imports Ray Data's internals (1.3 s of CPU).
"""

import time

from ray.data._internal.cluster_autoscaler import ClusterAutoscaler, DefaultAutoscalingCoordinator
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
    STANDARD_RESOURCE_TYPES,
)
from ray.data._internal.execution.interfaces import ExecutionResources

EXPIRES_S = 60.0
"""A request that nobody renews is withdrawn after this: its driver and collector were killed."""

RENEW_S = 15.0


def requester(run_id: str) -> str:
    """The name under which a run asks."""
    return f"raypipe-{run_id}"


class Asking:
    """What one run asks the autoscaler for."""

    def __init__(self, run_id: str):
        self._coordinator = DefaultAutoscalingCoordinator(requester(run_id))
        self._asked: tuple[int, int] | None = None
        self._at = 0.0

    def ask(self, cpus: int, gpus: int) -> None:
        """Ask for so many CPUs and GPUs in all, those that are there included. Call it often."""
        now = time.monotonic()
        if self._asked == (cpus, gpus) and now - self._at < RENEW_S:
            return
        self._asked, self._at = (cpus, gpus), now
        self._coordinator.request_resources(
            [{"CPU": 1.0}] * cpus + [{"GPU": 1.0}] * gpus,
            expire_after_s=EXPIRES_S,
            # The object store, which nobody asks for by number.
            request_remaining=STANDARD_RESOURCE_TYPES,
        )

    def withdraw(self) -> None:
        """Ask for nothing any more."""
        self._coordinator.cancel_request()


class Asked(ClusterAutoscaler):
    """In an execution of a run that asks by itself: Ray Data does not ask once more."""

    def __init__(self, run_id: str, before: ClusterAutoscaler):
        before.on_executor_shutdown()  # withdraw what it has asked for
        self._coordinator = DefaultAutoscalingCoordinator(requester(run_id))

    def try_trigger_scaling(self) -> None:
        """Do nothing: the run asks."""

    def on_executor_shutdown(self) -> None:
        """Do nothing: the run withdraws at its end."""

    def get_total_resources(self) -> ExecutionResources:
        """What the cluster has for this run."""
        total = ExecutionResources.zero()
        for had in self._coordinator.get_reserved_resources().values():
            total = total.add(ExecutionResources.from_resource_dict(had))
        return total
