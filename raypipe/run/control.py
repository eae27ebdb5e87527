"""A run from outside: which there are, how they go, and how many actors they shall have. For other processes, nodes and notebooks."""

import os
import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from raypipe import UsageError
from raypipe.run.collector import NAMESPACE
from raypipe.run.session import ENDING, token_missing, without_rays_lines

_NAME = "raypipe-"
_ANSWER_S = 10.0


def connect(address: str | None = None) -> None:
    """Join the cluster at `address`, else the one that RAY_ADDRESS names, else the Ray that runs on this machine.

    Raises:
        UsageError: there is none.
    """
    if ray.is_initialized():
        return
    # Ray would ask 20 times, 40 s each where nobody listens; who types a command wants to know sooner.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")
    wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _check_listens(wanted)
        with without_rays_lines():
            ray.init(address=wanted, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        if wanted == "auto":
            raise UsageError(
                "No Ray runs on this machine, so there is no run to look at. Start one (python jobs/preprocess.py ...), or name its cluster "
                "with --address or RAY_ADDRESS."
            ) from error
        raise token_missing(wanted, error) or UsageError(
            f"No Ray cluster answers at {wanted!r} ({str(error).splitlines()[0]}). Correct --address or RAY_ADDRESS."
        ) from error


def _check_listens(address: str) -> None:
    """Raises OSError where nobody does, if `address` is HOST:PORT."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def names() -> list[str]:
    """The ids of the runs of the cluster."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"].removeprefix(_NAME) for actor in found if actor["namespace"] == NAMESPACE and actor["name"].startswith(_NAME)
    )


def runs() -> list[dict[str, Any]]:
    """The live records (`Control.live`) of all runs of the cluster, the newest first."""
    records = []
    for run_id in names():
        try:
            records.append(attach(run_id).live())
        except UsageError:  # it ended between the two questions
            continue
    return sorted(records, key=lambda record: record["at_s"])


def attach(run_id: str | None = None) -> "Control":
    """The run of that id; without one the only run of the cluster, or the newest.

    Raises:
        UsageError: there is none, or none of that name.
    """
    if run_id is None:
        found = runs()
        if not found:
            raise UsageError("No run is under way on this cluster. Start one (python jobs/preprocess.py ...), then try again.")
        run_id = found[0]["run_id"]
    try:
        return Control(run_id, ray.get_actor(f"{_NAME}{run_id}", namespace=NAMESPACE))
    except ValueError as error:
        there = ", ".join(names()) or "none"
        raise UsageError(
            f"No run {run_id!r} is under way on this cluster; there are: {there}. `raypipe runs` lists them."
        ) from error


class Control:
    """Looks at a run that is under way, and changes its actor counts."""

    def __init__(self, run_id: str, collector: ray.actor.ActorHandle):
        self.run_id = run_id
        self._collector = collector

    def live(self) -> dict[str, Any]:
        """How the run goes: JSON types, None is unknown (`raypipe.run.collector.Collector.live`).

        Raises:
            UsageError: it has ended.
        """
        return self._ask("live")

    def scale(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Have so many actors of the stages named; all wanted counts are returned. New actors take as long as their start takes, and
        those too many finish what they have: no row is lost or done twice. `auto` leaves a stage alone from then on.

        Raises:
            UsageError: more than the cluster has CPUs for, less than 1, or no such stage: nothing is changed. Or the run has ended.
        """
        answer = self._ask("scale", dict(counts))
        if isinstance(answer, str):
            asked = " ".join(f"{stage}={count}" for stage, count in counts.items())
            raise UsageError(f"{asked}: {answer}. Nothing was changed; the run {self.run_id} goes on.")
        return answer

    def _ask(self, question: str, *given: Any) -> Any:
        gone = UsageError(f"The run {self.run_id} has ended, or its cluster does not answer.")
        try:
            with ENDING:
                if not ray.is_initialized():
                    raise gone
                return ray.get(getattr(self._collector, question).remote(*given), timeout=_ANSWER_S)
        except RayError as error:
            raise gone from error
        except AttributeError as error:
            raise UsageError(f"The run {self.run_id} is one of another version of raypipe, which cannot be asked.") from error
