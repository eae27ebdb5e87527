"""What the nodes of a cluster have now, and how many nodes its autoscaler may add."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from raypipe.errors import UsageError, foreign
from raypipe.insight.room import Node
from raypipe.run.cluster import internals

_HEAD = "node:__internal_head__"
"""A resource that only the head node has."""

_NO_TYPE = "node_"
"""Ray's monitor calls nodes by this name and their id where no autoscaler has started them."""


def nodes_now() -> list[Node]:
    """The nodes that are there, in Ray's order. Takes milliseconds: it asks the head."""
    going = _draining()
    return [
        Node(
            id=node["NodeID"],
            name=node["NodeManagerAddress"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory=int(node["Resources"].get("memory", 2**62)),
            leaving=node["NodeID"] in going,
            head=_HEAD in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _draining() -> set[str]:
    """The ids of nodes that are about to go, such as after a spot notice."""
    if internals.missing("draining"):
        return set()
    from ray._private.state import state

    return set(state.get_draining_nodes())


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a cluster may have when its autoscaler has added all the nodes that it may add.

    None: an autoscaler is there, but it does not say.
    """

    cpus: int | None = None
    gpus: int | None = None


def bounds(address: str) -> Bounds | None:
    """The bounds of the autoscaler of the cluster at `address`, HOST:PORT; None: it has none.

    They are in the autoscaler's own file, which a driver on the head node can read. On another
    node, and where Kubernetes has the file (KubeRay), they are not known.
    """
    if internals.missing("autoscaling"):
        return None
    from ray._private.state import state

    if (config := state.get_cluster_config()) is not None and config.node_group_configs:
        groups = [
            (dict(group.resources), group.max_count if group.max_count >= 0 else 10**6)
            for group in config.node_group_configs
        ]
        return _most(groups, limit=None)
    if (path := _file_of_monitor(address)) is not None:
        with contextlib.suppress(OSError, UsageError):
            return bounds_of(path.read_text())
    return Bounds() if _is_autoscaled(address) else None


def bounds_of(text: str) -> Bounds:
    """The bounds that the file of a cluster (as for `ray up`) sets.

    Raises:
        UsageError: it is no such file.
    """
    with foreign("the autoscaler's file", remedy=""):
        config = yaml.safe_load(text)
        types = config["available_node_types"]
        head = config.get("head_node_type")
        workers = [
            (dict(of.get("resources") or {}), int(of.get("max_workers", config["max_workers"])))
            for name, of in types.items()
            if name != head
        ]
        most = _most(workers, limit=int(config.get("max_workers", 10**6)))
        own = types[head].get("resources") or {} if head in types else {}
        return Bounds(
            cpus=None if most.cpus is None else most.cpus + int(own.get("CPU", 0)),
            gpus=None if most.gpus is None else most.gpus + int(own.get("GPU", 0)),
        )


def _most(groups: Sequence[tuple[Mapping[str, Any], int]], *, limit: int | None) -> Bounds:
    """The most that nodes of these groups have: (resources of one, how many), `limit` in all."""
    if any("CPU" not in resources for resources, count in groups if count):
        return Bounds()

    def most(kind: str) -> int:
        left, total = limit if limit is not None else 10**6, 0
        for resources, count in sorted(groups, key=lambda group: -group[0].get(kind, 0)):
            taken = min(count, left)
            left -= taken
            total += taken * int(resources.get(kind, 0))
        return total

    return Bounds(cpus=most("CPU"), gpus=most("GPU"))


def _file_of_monitor(address: str) -> Path | None:
    """The file that the autoscaler of the cluster at `address` reads, if it runs on this node."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if not any(part.endswith("monitor.py") for part in command[:4]):
                continue
            given = dict(part.lstrip("-").split("=", 1) for part in command if "=" in part)
            if given.get("gcs-address") == address and "autoscaling-config" in given:
                path = Path(os.path.expanduser(given["autoscaling-config"]))
                return path if path.is_absolute() else Path(process.cwd()) / path
    return None


def _is_autoscaled(address: str) -> bool:
    """Whether the nodes of the cluster at `address` are of an autoscaler's node types."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(address)
    except Exception:  # the first seconds of a cluster, or its monitor has ended
        return False
    nodes = [*status.active_nodes, *status.idle_nodes]
    return any(
        node.ray_node_type_name and not node.ray_node_type_name.startswith(_NO_TYPE)
        for node in nodes
    )
