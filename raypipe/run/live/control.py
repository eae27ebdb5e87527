"""Runs from outside: which go on, how they go, and how many actors they have.

For other processes, nodes and notebooks.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raypipe import UsageError
from raypipe.insight.states import LiveRun
from raypipe.run.cluster import joining
from raypipe.run.cluster.session import ENDING, without_rays_lines
from raypipe.run.given import typed
from raypipe.run.live import registry
from raypipe.run.live.collector import NAMESPACE
from raypipe.run.live.steering import NOT_BEGUN

_NAME = "raypipe-"
_ANSWER_S = 60.0
"""A collector takes half a minute to start on a busy machine."""

_joined: list[str] = []  # the address of the Ray that this module has joined, if it has


@dataclass(frozen=True)
class Place:
    """A run that goes on, and the address of its Ray; None: the Ray of this process.

    registered: this machine's registry names the address, so this user's token is for it.
    """

    run_id: str
    address: str | None
    output: str | None = None
    registered: bool = False


def connect(address: str, *, send_token: bool = False) -> None:
    """Join the cluster at `address`, and leave the one that was joined before.

    Args:
        send_token: send it the user's token, as to a Ray that this user started here.

    Raises:
        UsageError: none answers there.
    """
    if address in _joined and ray.is_initialized():
        return
    leave()
    # Ray would ask 20 times, for 40 s each where nobody listens: too long for a typed command.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")
    if send_token:
        with without_rays_lines():
            joining.send_token()
    joining.check_address(address, job=False)
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address.startswith("ray://"):  # its server loads what collectors answer
        options = joining.with_package(options)
    try:
        with without_rays_lines():
            ray.init(address=address, namespace=NAMESPACE, **options)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        if address == "auto":
            raise UsageError(
                "No Ray runs on this machine, so there is no run to look at. Start one "
                "(python jobs/preprocess.py ...), or name its cluster with --address or "
                "RAY_ADDRESS."
            ) from error
        raise joining.refusal(address, error, job=False) from error
    _joined.append(address)


def leave() -> None:
    """Leave the cluster that was joined here. One that the process joined otherwise stays."""
    if _joined and ray.is_initialized():
        ray.shutdown()
    _joined.clear()


def names() -> list[str]:
    """The ids of the runs of the cluster that this process has joined."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"].removeprefix(_NAME)
        for actor in found
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_NAME)
    )


def places(address: str | None = None) -> list[Place]:
    """The runs that go on.

    Those of the cluster at `address`. Without one: those of this machine, of the cluster that
    RAY_ADDRESS names, and of the Ray that this process has. No other Ray is joined.

    Raises:
        UsageError: there is no cluster at that address.
    """
    found: dict[str, Place] = {}
    if address is None and not _joined and ray.is_initialized():
        found = {run_id: Place(run_id, None) for run_id in names()}
    if address is None:
        for entry in registry.entries():
            place = Place(entry.run_id, entry.address, entry.output, registered=True)
            found.setdefault(entry.run_id, place)
    cluster = address or os.environ.get("RAY_ADDRESS")
    if cluster and (_joined or not ray.is_initialized()):
        connect(cluster)
        for run_id in names():
            found.setdefault(run_id, Place(run_id, cluster))
    return list(found.values())


def runs(address: str | None = None) -> list[LiveRun]:
    """The live records of `places`, the newest first.

    Raises:
        UsageError: there is no cluster at that address.
    """
    records = []
    for place in places(address):
        try:
            records.append(_at(place).look())
        except UsageError:  # it ended between the two questions
            continue
    return sorted(records, key=lambda record: record.at_s)


def attach(
    run_id: str | None = None,
    *,
    address: str | None = None,
    waiting: Callable[[], None] | None = None,
) -> "Control":
    """The run of that id; without one the only run that goes on.

    Args:
        address: of its cluster, if it is known (`places`).
        waiting: where there is none, wait for one, and call this once before.

    Raises:
        UsageError: there is none, several, or none of that name.
    """
    while True:
        found = places(address)
        wanted = [place for place in found if run_id in (None, place.run_id)]
        if len(wanted) == 1:
            return _at(wanted[0])
        if found or waiting is None:
            break
        waiting()
        while not places(address):
            time.sleep(1)
        time.sleep(1)  # its collector may still start
    there = "".join(
        f"\n  {place.run_id}{f', into {place.output}' if place.output else ''}" for place in found
    )
    if not found:
        raise UsageError(
            "No run is in progress here. Start one (python jobs/preprocess.py ...), then try again."
        )
    if run_id is not None:
        raise UsageError(f"No run {run_id!r} is in progress; these are:{there}\nGive one of these.")
    raise UsageError(
        f"{len(found)} runs are in progress:{there}\nNothing was changed. Say which, by its id."
    )


def _at(place: Place) -> "Control":
    if place.address is not None:
        connect(place.address, send_token=place.registered)
    try:
        return Control(place.run_id, ray.get_actor(f"{_NAME}{place.run_id}", namespace=NAMESPACE))
    except ValueError as error:
        raise UsageError(
            f"The run {place.run_id} has not begun yet, or has ended. "
            "`raypipe runs` lists those that go on."
        ) from error


class Control:
    """Looks at a run in progress, and changes its actor counts."""

    def __init__(self, run_id: str, collector: ray.actor.ActorHandle):
        self.run_id = run_id
        self._collector = collector

    def look(self) -> LiveRun:
        """How the run goes.

        Raises:
            UsageError: it has ended.
        """
        found = self._ask("live")
        if not isinstance(found, LiveRun):
            raise self._other_version()
        return found

    def live(self) -> dict[str, Any]:
        """How the run goes, as JSON types; None is unknown (`raypipe.insight.states.LiveRun`).

        Raises:
            UsageError: it has ended.
        """
        return self.look().json()

    def scale(self, counts: Mapping[str, int], *, wait: bool = False) -> dict[str, int]:
        """Set the number of actors of the stages named.

        New actors take as long as their start takes. Surplus ones finish what they have: no row is
        lost or done twice. `auto` leaves such a stage alone from then on.

        Args:
            wait: for the first actors, before which nothing can be scaled.

        Returns:
            The counts of all stages that are asked for. Where nodes are missing, fewer run until
            they come.

        Raises:
            UsageError: a count is no number of at least 1. Or there is no such stage. Or there is
                no room for the counts, also with all nodes that an autoscaler may add. Or the run
                has ended. Nothing is changed then.
        """
        counts = {stage: typed(stage, count, int) for stage, count in counts.items()}
        answer = self._ask("scale", dict(counts))
        while wait and isinstance(answer, str) and NOT_BEGUN in answer:
            time.sleep(0.1)
            answer = self._ask("scale", dict(counts))
        if isinstance(answer, str):
            asked = " ".join(f"{stage}={count}" for stage, count in counts.items())
            raise UsageError(
                f"{asked}: {answer}. Nothing was changed; the run {self.run_id} goes on."
            )
        return answer

    def _ask(self, question: str, *given: Any) -> Any:
        gone = UsageError(f"The run {self.run_id} has ended.")
        try:
            with ENDING:
                if not ray.is_initialized():
                    raise gone
                return ray.get(getattr(self._collector, question).remote(*given), timeout=_ANSWER_S)
        except GetTimeoutError as error:
            raise UsageError(
                f"The run {self.run_id} has not answered for {_ANSWER_S:.0f} s: its cluster is "
                "overloaded, or cannot be reached. Nothing was changed. Try again."
            ) from error
        except RayError as error:
            raise gone from error
        except AttributeError as error:
            raise self._other_version() from error

    def _other_version(self) -> UsageError:
        return UsageError(
            f"The run {self.run_id} is one of another version of raypipe, which cannot be asked."
        )
