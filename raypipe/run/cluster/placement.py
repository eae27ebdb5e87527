"""Where the actors of a run on a cluster start: spread over CPU nodes, others only where needed."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.insight.room import Node, staying
from raypipe.run.cluster import internals
from raypipe.run.cluster.capacity import nodes_now

FORGET_S = 3.0
"""Ray's view of what is free is as old as that at most: until then, placed actors count."""

_placed: list[tuple[float, str]] = []
"""When an actor was placed, and the node. All stages of this process share it."""


def options() -> dict[str, Any]:
    """Options for the next actor that takes a CPU: the node that it should start on.

    It is a preference. Where the node is full or gone, Ray takes another one.
    """
    nodes = staying(nodes_now())
    if len(nodes) < 2 or internals.missing("placing"):
        return {}
    from ray._private.state import available_resources_per_node

    now = time.monotonic()
    _placed[:] = [(at, node) for at, node in _placed if now - at < FORGET_S]
    free = {node: has.get("CPU", 0.0) for node, has in available_resources_per_node().items()}
    taken = Counter(node for _, node in _placed)
    best = chosen(nodes, {node: count - taken[node] for node, count in free.items()})
    _placed.append((now, best.id))
    there = NodeAffinitySchedulingStrategy(best.id, soft=True, _spill_on_unavailable=True)
    return {"scheduling_strategy": there}


def chosen(nodes: Sequence[Node], free: Mapping[str, float]) -> Node:
    """The node for the next actor: one with most free CPUs.

    Of those with a free CPU, nodes with GPUs come after those without, and the head comes last.

    Args:
        nodes: at least one.
        free: CPUs of each node that no actor holds, by its id.
    """

    def order(node: Node) -> tuple[bool, bool, bool, float]:
        has = free.get(node.id, 0.0)
        return has < 1, node.head, node.gpus > 0, -has

    return min(nodes, key=order)
