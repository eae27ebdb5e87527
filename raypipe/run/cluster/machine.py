"""The machine: versions, cores, processors, and the Ray that a run uses."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.insight.room import Node, Room


@dataclass(frozen=True, kw_only=True)
class Session:
    """The Ray that a run uses.

    at_most: actors of all stages together that have memory, and on a cluster a CPU each. With an
        autoscaler, when it has added all the nodes that it may add, as far as that is known.
    memory: bytes that they may take together, if each takes all that it may; inf on a cluster.
    cpus_each: logical CPUs of each actor.
    cores: physical cores on this machine, or logical CPUs of a cluster.
    address: HOST:PORT, to join it.
    there: as `at_most`, on the nodes that are there now. None: the same.
    grows: an autoscaler adds nodes.
    fits: counts beyond the room are fitted into it, instead of refused.
    most_gpus: as `at_most`, of GPUs. None: as many as there are.
    left_out: actors for which there is room too, but for others of this process.
    """

    at_most: int
    cpus_each: float
    cores: float
    nodes: int
    joined: bool
    dashboard: str | None
    address: str
    gpus: int = 0
    memory: float = math.inf
    there: int | None = None
    grows: bool = False
    fits: bool = False
    most_gpus: float | None = None
    left_out: int = 0

    @property
    def room(self) -> Room:
        """The room that is there now."""
        there = self.at_most if self.there is None else self.there
        return Room(actors=there, cores=self.cores, gpus=self.gpus, memory=self.memory)


def beside_driver() -> dict[str, Any]:
    """Options for an actor without a CPU on the driver's node, which other nodes cannot end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def versions() -> dict[str, str]:
    """Versions of the packages on which results and speed depend."""
    names = (
        "raypipe",
        "ray",
        "opencv-python-headless",
        "torch",
        "torchvision",
        "simplejpeg",
        "tifffile",
        "pillow",
        "numpy",
        "pyarrow",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # PackageNotFoundError: for raypipe, if a job brings only its source
            found[name] = "source" if name == "raypipe" else "missing"
    return found


def cores_here() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of(nodes: Sequence[Node]) -> int:
    """Number of cores of these nodes, at least 1.

    They are the CPUs that Ray knows. Of one node alone these may be logical: no more than there are
    on this machine.
    """
    cpus = sum(node.cpus for node in nodes)
    return max(cpus if len(nodes) > 1 else min(cpus, cores_here()), 1)


def hardware(session: Session) -> dict[str, Any]:
    """The report's `hardware`."""
    return {
        "cores": session.cores,
        "nodes": session.nodes,
        "gpus": session.gpus,
        "memory_bytes": psutil.virtual_memory().total,
        "processor": processor(),
    }


def processor() -> str:
    """Name of this machine's processor."""
    try:
        named = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        named = []
    return (
        named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine()
    )
