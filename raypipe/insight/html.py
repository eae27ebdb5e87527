"""Turns a report into report.html: one file, readable offline, without a script. Pure functions.

All that comes from outside (names, settings, reasons) goes through `text` or `tag`, every figure
through `known`. So a file name is text and never markup, and what was not measured is a dash and
never 0.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from raypipe.insight.figures import bars, colours, over_time
from raypipe.insight.markup import (
    ARROW,
    DASH,
    bytes_of,
    columns,
    duration,
    known,
    machine_use,
    number,
    share,
    swatch,
    table,
    tag,
    text,
)
from raypipe.insight.nodes import HEAD, rows_of
from raypipe.insight.states import STATES
from raypipe.insight.style import CSS
from raypipe.insight.terminal import notes


def page(report: dict, *, rejects: Sequence[dict] = (), more_rejects: int = 0) -> str:
    """The report of one run as a self-contained HTML document.

    Args:
        report: as raypipe.insight.report.build makes it, of an older version too: what that lacks
            is left out. `predicted` ({images_per_s, measured_images_per_s, actors: {stage: n}}) is
            of a run that followed a plan.
        rejects: a few of the rejected rows: image_id, uri, reason, detail, thumbnail (bytes of a
            small JPEG, or None).
        more_rejects: how many there are besides these.

    Returns:
        The document without lone surrogates: it encodes as UTF-8 whatever the files are called.
    """
    title = f"raypipe run {report.get('run_id') or ''}".strip()
    body = [
        tag("p", text(title), class_="run"),
        _verdict(report),
        section("Key figures", _key_figures(report)),
        section("Over time", over_time(report)),
        section("Stages", _stage_table(report)),
        section("Nodes", _nodes(report)),
        section("Training", _training(report)),
        section("Predicted against measured", _predicted(report)),
        section("Rejects", _rejects(report, rejects, more_rejects)),
        section(
            "How it was run",
            "".join(
                facts(name, report.get(name.lower()))
                for name in ("Settings", "Versions", "Hardware")
            ),
        ),
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """A self-contained page, which can load and run nothing. `body`: its parts, as HTML."""
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", text(title)),
        f"<style>{CSS}</style>",
    ]
    content = "\n".join(part for part in body if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n'
        f"<body><main>\n{content}\n</main></body></html>\n"
    )


def framed(page: str, *, height: int) -> str:
    """A page to put into a notebook; neither's style reaches the other. `height` in pixels."""
    style = f"width:100%;height:{height}px;border:0"
    return f'<div><iframe srcdoc="{escape(page)}" style="{style}"></iframe></div>'


def section(title: str, content: str) -> str:
    """A part of a page under a heading; empty without content."""
    return tag("section", tag("h2", title), content) if content else ""


def _verdict(report: dict) -> str:
    verdict = report.get("verdict") or {}
    first, dot, rest = str(verdict.get("reason") or "This report has no verdict.").partition(". ")
    measured = known(report.get("steady_images_per_s")) or known(report.get("images_per_s"))
    rows = []
    for change in verdict.get("advice") or []:
        predicted = known(change.get("predicted_images_per_s"))
        gain = 100 * (predicted / measured - 1) if predicted is not None and measured else None
        said = DASH if gain is None else "none" if abs(gain) < 2 else f"{gain:+,.0f}%"
        cells = (text(str(change.get("change")).replace(" -> ", ARROW)), number(predicted), said)
        rows.append(
            [tag("span", cell, class_="gain" if (gain or 0) >= 2 else "dim") for cell in cells]
        )
    advice = table(["What to change", "images/s expected", "gain"], rows, "Advice") if rows else ""
    return (
        tag("h1", text(first + dot.strip()))
        + (tag("p", text(rest), class_="lead") if rest else "")
        + advice
    )


def _key_figures(report: dict) -> str:
    into, out, rejected = (
        known(report.get(key)) for key in ("images_in", "images_out", "images_rejected")
    )
    unread = known(report.get("images_unread")) or 0
    became = f"= {number(out)} out + {number(rejected)} rejected" + (
        f" + {number(unread)} not read" if unread else ""
    )
    if before := known(report.get("images_done_before")):
        became += f"; {number(before)} of them by an earlier run"
    if (
        into is not None
        and out is not None
        and rejected is not None
        and into != out + rejected + unread
    ):
        lost = number(into - out - rejected - unread)
        became = tag(
            "strong", f"{number(out)} out + {number(rejected)} rejected: {lost} lost", class_="bad"
        )
    hardware = report.get("hardware") or {}
    nodes = known(hardware.get("nodes"))
    setup = known(report.get("setup_s"))
    tiles = [
        ("images in", number(into), became),
        (
            "images/s, steady",
            number(report.get("steady_images_per_s")),
            "from when actors could begin to the last shard",
        ),
        ("images/s, overall", number(report.get("images_per_s")), "from start to end"),
        ("first output", duration(report.get("first_output_s")), "after the start"),
        (
            "wall time",
            duration(report.get("wall_s")),
            "" if setup is None else f"after {duration(setup)} of set-up",
        ),
        (
            "CPU of the machine",
            number(report.get("cpu_percent"), "%"),
            machine_use(report.get("stages_cpu_percent"), report.get("other_cpu_percent"))
            or "mean of all cores over the run",
        ),
        (
            "cores",
            number(hardware.get("cores")),
            f"on {number(nodes)} node{'' if nodes == 1 else 's'}" if nodes else "",
        ),
    ]
    if (store := known(report.get("object_store_peak_bytes"))) is not None:
        tiles.append(("object store at most", bytes_of(store), "shared memory, counted once"))
    figures = (
        tag("div", tag("dt", name), tag("dd", tag("b", value), note)) for name, value, note in tiles
    )
    return tag("dl", *figures, class_="tiles") + "".join(
        tag("p", text(line)) for line in notes(report)
    )


def _actors(stage: dict) -> str:
    counts = {
        key: number((stage.get("actors") or {}).get(key)) for key in ("start", "min", "max", "end")
    }
    return (
        counts["start"]
        if len(set(counts.values())) == 1
        else "<br>".join(f"{key} {value}" for key, value in counts.items())
    )


def _spent(stage: dict, colour: str) -> str:
    """Busy, starved and blocked as one bar."""
    shares = [(state, known(stage.get(state))) for state in STATES]
    if any(share is None for _, share in shares):
        return DASH
    return tag(
        "span",
        *(
            tag("i", class_=state, style=f"width:{100 * (share or 0):.1f}%")
            for state, share in shares
        ),
        class_=f"spent {colour}",
        aria_hidden="true",
    )


_FIGURES: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("actors", _actors),
    ("images", lambda s: number(s.get("images"))),
    ("CPU an image", lambda s: number(s.get("cpu_s_per_image"), " ms", 1000)),
    ("busy an image", lambda s: number(s.get("busy_s_per_image"), " ms", 1000)),
    ("CPU, of all cores", lambda s: number(s.get("cpu_percent"), "%")),
    ("private memory at most", lambda s: bytes_of(s.get("private_peak_bytes"))),
    ("with shared pages (RSS)", lambda s: bytes_of(s.get("rss_peak_bytes"))),
    ("GPU", lambda s: number(s.get("gpu_percent"), "%")),
    ("GPU memory at most", lambda s: bytes_of(s.get("gpu_memory_peak_bytes"))),
    ("read", lambda s: bytes_of(s.get("bytes_in"))),
    ("put out", lambda s: bytes_of(s.get("bytes_out"))),
    ("busy", lambda s: share(s.get("busy"))),
    ("starved (no input)", lambda s: share(s.get("starved"))),
    ("blocked (output full)", lambda s: share(s.get("blocked"))),
)


def _stage_table(report: dict) -> str:
    stages = report.get("stages") or []
    if not stages:
        return ""
    shown = columns(stages)
    of = colours(report)
    head = [""] + [
        tag("span", text(name), class_="dim") if is_step else swatch(name, of.get(name, "none"))
        for name, _, is_step in shown
    ]
    rows = []
    for label, cell in _FIGURES:
        # A step has no actors of its own, and no memory.
        cells = [(cell(dict(record)), is_step) for _, record, is_step in shown]
        rows.append([label, *("" if is_step and said == DASH else said for said, is_step in cells)])
    spent = [
        "" if is_step else _spent(dict(record), of.get(name, "none"))
        for name, record, is_step in shown
    ]
    return table(head, [*rows, ["shares of its time", *spent]], "Stages")


def _nodes(report: dict) -> str:
    rows = [[text(cell) for cell in row] for row in rows_of(report)]
    return table(HEAD, rows, "Nodes") if rows else ""


_EPOCHS: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("epoch", lambda e: number(e.get("epoch"))),
    ("loss", lambda e: number(e.get("loss"))),
    ("mAP", lambda e: number(e.get("map"))),
    ("at IoU .50", lambda e: number(e.get("map50"))),
    ("images", lambda e: number(e.get("images"))),
    ("images/s", lambda e: number(e.get("images_per_s"))),
    ("waiting for data", lambda e: share(e.get("wait_share"))),
)


def _training(report: dict) -> str:
    training = report.get("train") or {}
    epochs = training.get("epochs") or []
    if not training:
        return ""
    computed, waited = (
        share(training.get(key)) for key in ("accelerator_utilisation", "wait_share")
    )
    said = tag(
        "p",
        f"The workers were in steps for {computed} of their time and waited for data for {waited}.",
    )
    reason = (training.get("break_even") or {}).get("reason")
    stored = (
        tag("p", tag("b", "Preprocess once, or while training? "), text(reason)) if reason else ""
    )
    rows = [[cell(epoch) for _, cell in _EPOCHS] for epoch in epochs]
    return said + stored + (table([name for name, _ in _EPOCHS], rows, "Epochs") if rows else "")


def _predicted(report: dict) -> str:
    plan = report.get("predicted") or {}
    predicted, measured = known(plan.get("images_per_s")), known(plan.get("measured_images_per_s"))
    if predicted is None:
        return ""
    both = bars(
        [
            (name, value or 0.0, number(value, " images/s"), "s0")
            for name, value in (("predicted", predicted), ("measured", measured))
        ]
    )
    said = ""
    if predicted and measured:
        where = "above" if measured >= predicted else "below"
        said = f"Measured is {abs(measured / predicted - 1):.0%} {where} predicted."
    actors = ", ".join(
        f"{text(stage)} {number(count)}" for stage, count in (plan.get("actors") or {}).items()
    )
    return both + tag("p", said, f" Planned actors: {actors}." if actors else "")


def _rejects(report: dict, rejects: Sequence[dict], more: int) -> str:
    total = known(report.get("images_in"))
    counts = [
        (reason, known(count) or 0.0)
        for reason, count in (report.get("rejects_by_reason") or {}).items()
    ]
    if not counts and not rejects and not more:
        return tag("p", "No image was rejected.")
    drawn = [
        (
            text(reason),
            count,
            number(count)
            + (tag("span", f" ({number(100 * count / total)}%)", class_="dim") if total else ""),
            "s0",
        )
        for reason, count in sorted(counts, key=lambda pair: -pair[1])
    ]
    shown = tag("ul", *map(_reject, rejects), class_="rows") if rejects else ""
    return (
        bars(drawn)
        + shown
        + (
            tag("p", f"and {number(more)} further, in rejects.parquet", class_="dim")
            if more
            else ""
        )
    )


def _reject(row: dict) -> str:
    name = row.get("image_id") or DASH
    data = row.get("thumbnail")
    picture = tag("span", "no picture", class_="no")
    if data:
        picture = tag(
            "img",
            alt=f"thumbnail of {name}",
            src=f"data:image/jpeg;base64,{b64encode(data).decode()}",
        )
    lines = [
        tag("span", text(row[key]), class_="dim", dir="auto")
        for key in ("uri", "detail")
        if row.get(key)
    ]
    return tag(
        "li",
        picture,
        tag(
            "div",
            tag("b", text(name), dir="auto"),
            tag("em", text(row.get("reason") or DASH)),
            *lines,
        ),
    )


def facts(title: str, known_facts: dict | None) -> str:
    """A table of names and values that opens on a click; empty without any."""

    def shown(key: str, value: Any) -> str:
        if value is None:
            return DASH
        if key.endswith("_bytes") and known(value) is not None:
            return bytes_of(value)
        return text(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )

    rows = [[text(key), shown(str(key), value)] for key, value in (known_facts or {}).items()]
    return tag("details", tag("summary", title), table([], rows, title)) if rows else ""
