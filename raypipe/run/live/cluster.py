"""The nodes of a run's cluster, as its collector follows them: how many actors have room now."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

from raypipe.insight.remarks import STALLED_S, Notice, Short, notices
from raypipe.insight.room import Node, Room, actors_on, staying
from raypipe.insight.states import LiveNode, PoolView
from raypipe.run.cluster.capacity import nodes_now
from raypipe.run.cluster.machine import cores_of
from raypipe.run.live.metrics import Place, Share
from raypipe.run.live.steering import Facts, Steering

if TYPE_CHECKING:
    from raypipe.run.cluster.asking import Asking

LOOK_EVERY_S = 1.0


class Nodes:
    """Follows the nodes: fits the counts to them, and asks the autoscaler for more."""

    def __init__(
        self,
        run_id: str,
        facts: Facts,
        steering: Steering,
        nodes: Callable[[], list[Node]] = nodes_now,
    ):
        self._run_id, self._facts, self._steering = run_id, facts, steering
        self._nodes_now = nodes
        self._at: float | None = None
        self._short_since: float | None = None
        self._asking: Asking | None = None
        self.names: dict[str, str] = {}
        """The address of each node that was ever there, by its id."""

    def look(self, now: float) -> None:
        """Look at the nodes, once a second at most."""
        if not self._facts.moves or (self._at is not None and now - self._at < LOOK_EVERY_S):
            return
        self._at = now
        try:
            nodes = self._nodes_now()
        except (RayError, OSError, RuntimeError):  # the head does not answer: ask again
            return
        self.names |= _names(nodes, self.names)
        self._steering.resize(self._room(staying(nodes)), now)
        short = self._on_cpus() > self._steering.room.actors
        self._short_since = (self._short_since or now) if short else None
        if self._facts.grows:
            self._ask()

    def _room(self, nodes: list[Node]) -> Room:
        holds = max(self._facts.holds.values(), default=0)
        return Room(
            actors=actors_on(nodes, holds=holds, asked=self._on_cpus()) - self._facts.left_out,
            cores=cores_of(nodes),
            gpus=sum(node.gpus for node in nodes),
            memory=self._facts.memory,
        )

    def _on_cpus(self) -> int:
        """Actors that are asked for, and take a CPU each."""
        asked = self._asked()
        return sum(count for stage, count in asked.items() if stage not in self._facts.on_gpu)

    def _asked(self) -> dict[str, int]:
        """Actors of each stage that are asked for, and workers beside them."""
        return {**self._facts.fixed, **self._facts.asked, **self._steering.asked}

    def _ask(self) -> None:
        if self._asking is None:
            from raypipe.run.cluster.asking import Asking  # it imports Ray Data: 1.3 s of CPU

            self._asking = Asking(self._run_id)
        cpus = self._on_cpus()
        self._asking.ask(cpus, sum(self._asked().values()) - cpus)

    def withdraw(self) -> None:
        """Ask the autoscaler for nothing any more."""
        if self._asking is not None:
            self._asking.withdraw()

    # --- what is told ---------------------------------------------------------------------------

    def notices(
        self,
        now: float,
        pools: Mapping[str, PoolView],
        *,
        at_work: Mapping[str, int],
        idle_s: float,
    ) -> list[Notice]:
        """What the run waits for (`remarks.notices`)."""
        short = None
        if self._short_since is not None:
            short = Short(
                asked=self._on_cpus(),
                there=self._steering.room.actors,
                for_s=now - self._short_since,
                grows=self._facts.grows,
            )
        free = None
        if self._facts.moves and idle_s >= STALLED_S:
            free = ray.available_resources().get("CPU", 0.0)
        return notices(pools, at_work=at_work, idle_s=idle_s, short=short, free_cpus=free)

    def live(
        self, shares: Mapping[Place, Share], percents: Mapping[str, float]
    ) -> tuple[LiveNode, ...]:
        """The nodes that have actors, or had some; of one node alone nothing.

        Args:
            shares: what each stage does on each node.
            percents: use of each node's cores, 0 to 100.
        """
        if not self._facts.moves:
            return ()
        there: dict[str, dict[str, Share]] = defaultdict(dict)
        for (stage, node), share in shares.items():
            there[node][stage] = share
        return tuple(
            LiveNode(
                name=self.names.get(node, node[:8]),
                actors={stage: share.actors for stage, share in stages.items()},
                images_per_s=_most(share.images_per_s for share in stages.values()),
                cpu_percent=percents.get(node),
                rss_bytes=sum(share.rss_bytes for share in stages.values()),
            )
            for node, stages in sorted(there.items(), key=lambda item: self.names.get(item[0], ""))
            if any(share.actors for share in stages.values())
        )


def _names(nodes: list[Node], known: Mapping[str, str]) -> dict[str, str]:
    """A name for people of each new node, by its id: its address, and the id where it must be."""
    shared = Counter(node.name for node in nodes)
    taken = set(known.values())
    return {
        node.id: f"{node.name} {node.id[:6]}"
        if shared[node.name] > 1 or node.name in taken
        else node.name
        for node in nodes
        if node.id not in known
    }


def _most(rates: Iterable[float | None]) -> float | None:
    """The highest rate: an image counts once, however many stages do it on a node."""
    known = [rate for rate in rates if rate is not None]
    return max(known, default=None)
