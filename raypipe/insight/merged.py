"""Several reports as one: the parts of an output, or runs that did one thing together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]
"""A report, or a stage of it, as JSON types."""


def merged(reports: Sequence[Record]) -> dict[str, Any]:
    """The sums of what reports count, and the costs of their stages.

    Returns:
        `images_in`, `images_out`, `images_rejected`, `images_unread`, `images_done_before`,
        `rejects_by_reason`; `wall_s`, summed, as parts may have run one after another;
        `images_per_s`, summed, as if they had run at once; `stages`, each with `name`, `images`,
        and `cpu_s_per_image` and `busy_s_per_image` over all its images. None: no report has it.
    """
    counts = ("images_in", "images_out", "images_rejected", "images_unread", "images_done_before")
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report["rejects_by_reason"])
    names = dict.fromkeys(stage["name"] for report in reports for stage in report["stages"])
    return {
        **{name: sum(report.get(name) or 0 for report in reports) for name in counts},
        "rejects_by_reason": dict(reasons.most_common()),
        "wall_s": _sum(report["wall_s"] for report in reports),
        "images_per_s": _sum(report["images_per_s"] for report in reports),
        "stages": [_stage(name, reports) for name in names],
    }


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _stage(name: str, reports: Sequence[Record]) -> dict[str, Any]:
    stages = [stage for report in reports for stage in report["stages"] if stage["name"] == name]
    images = sum(stage["images"] for stage in stages)

    def each(cost: str) -> float | None:
        known = [(s[cost], s["images"]) for s in stages if s[cost] is not None]
        seen = sum(count for _, count in known)
        return sum(value * count for value, count in known) / seen if seen else None

    return {
        "name": name,
        "images": images,
        "cpu_s_per_image": each("cpu_s_per_image"),
        "busy_s_per_image": each("busy_s_per_image"),
    }


def summary(reports: Mapping[str, Record], missing: Sequence[str] = ()) -> Group:
    """The reports, a line each, and their sums, for a terminal.

    Args:
        reports: by their place.
        missing: places that have none yet.
    """
    table = Table("report", "in", "out", "rejected", "s", "images/s", "limits", box=box.SIMPLE_HEAD)
    for column in table.columns[1:6]:
        column.justify = "right"
    all_ = merged([*reports.values()])
    for place, report in (*zip(_short([*reports]), reports.values(), strict=True), ("all", all_)):
        verdict = report.get("verdict") or {}
        table.add_row(
            Text(place),
            *(str(report[name]) for name in ("images_in", "images_out", "images_rejected")),
            *(
                _number(report[name], form)
                for name, form in (("wall_s", ".1f"), ("images_per_s", ".0f"))
            ),
            Text(verdict.get("stage") or ""),
        )
    lines = [
        f"{stage['name']}: {_number(stage['cpu_s_per_image'], '.2f', 1000)} ms of CPU and "
        f"{_number(stage['busy_s_per_image'], '.2f', 1000)} ms busy an image"
        for stage in all_["stages"]
    ]
    if all_["images_unread"]:
        lines.append(f"{all_['images_unread']} images were not read: the same commands try them")
    if all_["rejects_by_reason"]:
        told = ", ".join(f"{count} {why}" for why, count in all_["rejects_by_reason"].items())
        lines.append(f"rejected: {told}")
    lines += [f"no report yet: {place}" for place in missing]
    return Group(table, *(Text(line) for line in lines))


def _short(places: Sequence[str]) -> list[str]:
    """The places without the folder that they share, and without the name of their file."""
    folders = [place.partition("?")[0].removesuffix("/report.json").split("/") for place in places]
    same = 0
    for names in zip(*(folder[:-1] for folder in folders), strict=False):
        if len(set(names)) > 1:
            break
        same += 1
    return ["/".join(folder[same:]) for folder in folders]


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)
