"""The bounds of an autoscaler, and the nodes that actors start on."""

import pytest

from raypipe.errors import UsageError
from raypipe.insight.room import Node
from raypipe.run.cluster.capacity import Bounds, bounds_of
from raypipe.run.cluster.placement import chosen
from tests.conftest import ROOT

CLUSTER = """
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 1}}
  cpu: {resources: {CPU: 2}, min_workers: 1, max_workers: 2}
  gpu: {resources: {CPU: 4, GPU: 1}, max_workers: 2}
"""


def test_the_bounds_are_those_of_the_largest_nodes_that_may_come():
    # 3 workers: two of 4 CPUs, then one of 2; and the head's CPU.
    assert bounds_of(CLUSTER) == Bounds(cpus=11, gpus=2)
    # Nodes whose size only the cloud knows: `ray up` fills it in.
    assert bounds_of((ROOT / "cluster.yaml").read_text()) == Bounds()


@pytest.mark.parametrize("text", ["", "[1", "a: 1", "available_node_types: 3"])
def test_a_file_that_is_none_of_an_autoscaler_is_no_traceback(text):
    with pytest.raises(UsageError):
        bounds_of(text)


def test_actors_start_where_most_is_free_on_gpu_nodes_later_and_on_the_head_last():
    head, gpu = Node(id="h", name="h", cpus=8, head=True), Node(id="g", name="g", cpus=8, gpus=1)
    first, second = (Node(id=name, name=name, cpus=2) for name in "ab")
    nodes = [head, gpu, first, second]
    free: dict[str, float] = {"h": 8, "g": 8, "a": 2, "b": 2}
    placed = []
    for _ in range(22):
        node = chosen(nodes, free)
        free[node.id] -= 1
        placed.append(node.id)
    # When all is taken they wait, and not for the head.
    assert "".join(placed) == "abab" + 8 * "g" + 8 * "h" + "ab"
