"""What the nodes of a cluster did in a run, for its report."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from raypipe.insight.markup import bytes_of, number
from raypipe.insight.states import Sample, Snapshot


def nodes_of(snapshot: Snapshot) -> list[dict[str, Any]]:
    """A record of each node that had actors, in the order of their names.

    Returns:
        `name`: its address; `actors`: of each stage, all processes that were ever there;
        `images`: by the stage that did most there; `images_per_s`: while it had actors;
        `cpu_percent`: of its cores meanwhile, by whatever ran there, 0 to 100;
        `rss_peak_bytes`: the sum of its actors' peaks.
    """
    there: dict[str, list[Sample]] = defaultdict(list)
    for sample in snapshot.actors:
        there[sample.node].append(sample)
    begun: dict[str, float] = {}
    for sample in snapshot.first:
        begun[sample.node] = min(begun.get(sample.node, sample.at), sample.at)
    records = [_record(snapshot, node, samples, begun.get(node)) for node, samples in there.items()]
    return sorted(records, key=lambda record: str(record["name"]))


def _record(
    snapshot: Snapshot, node: str, samples: list[Sample], begun: float | None
) -> dict[str, Any]:
    images: Counter[str] = Counter()
    for sample in samples:
        images[sample.stage] += sample.images
    most = max(images.values())
    took_s = max(sample.at for sample in samples) - begun if begun is not None else 0.0
    used = snapshot.nodes.get(node)
    known = used is not None and used.cpu_total_s > 0
    return {
        "name": snapshot.node_names.get(node, node[:8]),
        "actors": dict(Counter(sample.stage for sample in samples)),
        "images": most,
        "images_per_s": most / took_s if took_s > 0 else None,
        "cpu_percent": 100 * used.cpu_busy_s / used.cpu_total_s if used and known else None,
        "rss_peak_bytes": sum(sample.rss_peak_bytes for sample in samples),
    }


HEAD = ("node", "actors", "images", "images/s", "CPU", "memory")


def rows_of(report: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a table of the report's nodes under HEAD; empty: there was one node, or none."""
    records = report.get("nodes") or []
    if len(records) < 2:
        return []
    return [
        [
            str(record.get("name")),
            " + ".join(f"{count} {stage}" for stage, count in (record.get("actors") or {}).items()),
            number(record.get("images")),
            number(record.get("images_per_s")),
            number(record.get("cpu_percent"), "%"),
            bytes_of(record.get("rss_peak_bytes")),
        ]
        for record in records
    ]
