"""Room for actors on the nodes of a cluster, and counts that fit into it."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node that is there.

    id: Ray's, in hexadecimal. name: its address, for people. cpus, gpus: logical ones.
    memory: bytes that Ray has there for actors. leaving: it gets no new work and will go.
    head: Ray's own services run there.
    """

    id: str
    name: str
    cpus: int
    gpus: int = 0
    memory: int = 2**62
    leaving: bool = False
    head: bool = False


@dataclass(frozen=True, kw_only=True)
class Room:
    """What actors of a run may take now.

    actors: so many, those on GPUs not counted. cores: shared by all of them.
    memory: bytes that they may take together (`planner.Machine.memory`).
    """

    actors: int
    cores: float
    gpus: int = 0
    memory: float = math.inf


def staying(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that actors may be put on."""
    return [node for node in nodes if not node.leaving]


def actors_on(nodes: Sequence[Node], *, holds: int, asked: int) -> int:
    """How many actors have a CPU and memory on `nodes`.

    Who asks for more actors than there is memory for gets them, one a CPU.

    Args:
        holds: bytes that one actor may take.
        asked: so many are asked for.
    """
    cpus = sum(node.cpus for node in nodes)
    by_memory = sum(min(node.cpus, node.memory // max(holds, 1)) for node in nodes)
    return min(cpus, max(by_memory, asked))


def fitted(
    asked: Mapping[str, int],
    room: Room,
    *,
    on_gpu: Collection[str] = (),
    fixed: Collection[str] = (),
) -> dict[str, int]:
    """The counts nearest to `asked` that there is room for; at least 1 actor a stage.

    Where there is less room than that needs, the sum is above the room.

    Args:
        asked: actors of each stage.
        on_gpu: stages each of whose actors takes a GPU instead of a CPU.
        fixed: stages whose count cannot change. They take their room first.
    """
    counts = dict(asked)
    for there, total in ((False, room.actors), (True, room.gpus)):
        group = {name: count for name, count in asked.items() if (name in on_gpu) is there}
        taken = sum(count for name, count in group.items() if name in fixed)
        counts |= _shrunk({n: c for n, c in group.items() if n not in fixed}, total - taken)
    return counts


def _shrunk(asked: Mapping[str, int], total: int) -> dict[str, int]:
    """`asked`, in proportion, with the sum `total`; at least 1 each."""
    if sum(asked.values()) <= total:
        return dict(asked)
    more = {name: count - 1 for name, count in asked.items()}
    left = max(total - len(asked), 0)
    shares = {name: left * count / max(sum(more.values()), 1) for name, count in more.items()}
    counts = {name: 1 + int(share) for name, share in shares.items()}
    # What rounding left goes to the largest remainders.
    rest = max(total, len(asked)) - sum(counts.values())
    for name in sorted(shares, key=lambda name: int(shares[name]) - shares[name])[:rest]:
        counts[name] += 1
    return counts
