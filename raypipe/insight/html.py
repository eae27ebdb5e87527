"""A run's report -> report.html: one file, readable offline, with no script in it. Pure functions: plain records in, a string out.

Everything that comes from outside (names, settings, reasons) goes through `text` or `tag`, every figure through `known`: a file name is
text and never markup, and what was not measured is a dash and never 0.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from raypipe.insight.figures import STATES, bars, colours, over_time
from raypipe.insight.markup import (
    ARROW,
    DASH,
    bytes_of,
    duration,
    known,
    number,
    share,
    swatch,
    table,
    tag,
    text,
)
from raypipe.insight.report import notes


def page(report: dict, *, rejects: Sequence[dict] = (), more_rejects: int = 0) -> str:
    """The report of one run as a self-contained HTML document.

    Args:
        report: as raypipe.insight.report.build makes it; of an older version too: what it lacks is left out. It may have `predicted`
            ({images_per_s, measured_images_per_s, actors: {stage: n}}), of a run that followed a plan.
        rejects: a few of the rejected rows: image_id, uri, reason, detail, thumbnail (bytes of a small JPEG, or None).
        more_rejects: how many there are besides these.

    Returns:
        The document, free of lone surrogates: it can be encoded as UTF-8 whatever the files are called.
    """
    title = f"raypipe run {report.get('run_id') or ''}".strip()
    body = [
        tag("p", text(title), class_="run"),
        _verdict(report),
        section("Key figures", _key_figures(report)),
        section("Over time", over_time(report)),
        section("Stages", _stage_table(report)),
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
    """A whole page, self-contained: `body` are its parts as HTML; it can load and run nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", text(title)),
        f"<style>{_CSS}</style>",
    ]
    content = "\n".join(part for part in body if part)
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def framed(page: str, *, height: int) -> str:
    """A whole page as HTML to put into another, of a notebook: neither's style reaches the other. `height` in pixels."""
    return f'<div><iframe srcdoc="{escape(page)}" style="width:100%;height:{height}px;border:0"></iframe></div>'


def section(title: str, content: str) -> str:
    """A part of a page under a heading; nothing without content."""
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
            "mean of all cores over the run",
        ),
        (
            "cores",
            number(hardware.get("cores")),
            f"on {number(nodes)} node{'' if nodes == 1 else 's'}" if nodes else "",
        ),
    ]
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
    ("memory (RSS) at most", lambda s: bytes_of(s.get("rss_peak_bytes"))),
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
    colour_of = [colours(report).get(str(stage.get("name")), "none") for stage in stages]
    head = [
        "",
        *(
            swatch(stage.get("name"), colour)
            for stage, colour in zip(stages, colour_of, strict=True)
        ),
    ]
    rows = [[label, *map(cell, stages)] for label, cell in _FIGURES]
    return table(head, [*rows, ["shares of its time", *map(_spent, stages, colour_of)]], "Stages")


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
    said = (
        f"Measured is {abs(measured / predicted - 1):.0%} {'above' if measured >= predicted else 'below'} predicted."
        if predicted and measured
        else ""
    )
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
    """A table of names and values, to be opened; nothing without any."""

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


_CSS = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f5f7f9;--ink:#1a1f26;--dim:#596471;--line:#d9dee4;--bad:#b3261e;--good:#00704f;
--c0:#0067b0;--c1:#c8550c;--c2:#00866a;--c3:#a8488f;--c4:#806400;--c5:#4d545c;--starved:#dfe4ea;--blocked:#8d97a3}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181d;--panel:#1d2329;--ink:#e7ebef;--dim:#9aa6b2;--line:#343c45;
--bad:#ff8a80;--good:#4fd1a5;--c0:#58b0ee;--c1:#f0a03c;--c2:#35c99f;--c3:#e58fcb;--c4:#e3d35a;--c5:#b8c0c8;
--starved:#3a434d;--blocked:#77838f}}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}.s5{--c:var(--c5)}
.none{--c:var(--dim)}.starved{--c:var(--starved)}.blocked{--c:var(--blocked)}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:2rem clamp(1rem,4vw,2.5rem) 4rem}
.run,.dim,.unit,dt{color:var(--dim)}.run{margin:0;font-size:.9rem}
h1{font-size:clamp(1.45rem,3.4vw,2.2rem);line-height:1.22;margin:.4rem 0 1rem;letter-spacing:-.012em;text-wrap:balance}
h2{font-size:1.15rem;margin:2.8rem 0 .9rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0;display:inline}
.lead{font-size:1.1rem;color:var(--dim);margin:0 0 1rem}
.gain{font-weight:600}td .gain{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.34rem 1.4rem .34rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);font-weight:400}
td{overflow-wrap:anywhere;min-width:4.5rem}
thead th{color:var(--dim)}.key{white-space:nowrap}tbody th{color:var(--dim);position:sticky;left:0;background:var(--bg)}h1~.scroll tbody th{color:inherit}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:.75rem;margin:0}.tiles :first-child{grid-column:span 2}
.tiles div{background:var(--panel);border-radius:10px;padding:.8rem 1rem}
.tiles dt{font-size:.85rem}.tiles dd{margin:0;font-size:.82rem;color:var(--dim);line-height:1.35}
.tiles b{display:block;font-size:1.6rem;font-weight:650;line-height:1.3;color:var(--ink);font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1.8rem 2.4rem}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .6rem;font-size:.88rem}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;margin-left:auto}
.key::before{content:"";display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em;background:var(--c)}
.plot{display:block;overflow:visible;height:170px;width:calc(100% - 58px);margin:10px 10px 42px 48px}
.plot text{font-size:12px;fill:var(--dim);font-variant-numeric:tabular-nums}.plot .said{fill:var(--ink);paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.in{overflow:visible}.grid{stroke:var(--line)}
path{fill:none;stroke:var(--c);vector-effect:non-scaling-stroke;stroke-width:2px;stroke-linejoin:round;stroke-linecap:round}
path.steps{stroke-linecap:butt;stroke-linejoin:miter}path.area{fill:var(--c);stroke:none}
.tall{height:230px}.ideal{stroke-width:1.5px;stroke-dasharray:5 4;opacity:.75}
.key.ideal::before{height:0;width:1.1em;border-top:2px dashed var(--c);background:none;vertical-align:.25em;border-radius:0}
.range{stroke:var(--c);stroke-width:1.5px;opacity:.55}.mark{fill:var(--c);stroke:var(--c);stroke-width:2px}.hollow{fill:var(--bg)}
.event{stroke:var(--c);stroke-width:1.5px;stroke-dasharray:4 3}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.13}
.spent{display:flex;width:8rem;height:.8em;margin-top:.35em;border-radius:3px;overflow:hidden}.spent i{background:var(--c)}
.bars{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:.4rem 1rem;margin:0 0 1rem;align-items:center}
.bars dd{margin:0;display:flex;align-items:center;gap:.6rem}.bars b{font-weight:600;white-space:nowrap}
.bars i{flex:none;height:1.1em;min-width:2px;background:var(--c);border-radius:0 3px 3px 0}
.rows{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.75rem}
.rows li{display:flex;gap:.9rem;background:var(--panel);border-radius:10px;padding:.75rem;break-inside:avoid}
.rows img,.rows .no{flex:none;width:84px;height:84px;object-fit:contain;border-radius:6px;background:var(--line)}
.rows .no{display:grid;place-content:center;font-size:.75rem;color:var(--dim);text-align:center}
.rows div{min-width:0;font-size:.85rem;line-height:1.4}.rows div>*{display:block;max-height:4.2em;overflow-y:auto}.rows em{font-style:normal;color:var(--bad)}
.claims td:nth-child(3),.claims td:nth-child(4){min-width:15rem}
.pill{display:inline-block;white-space:nowrap;font-size:.82rem;font-weight:600;padding:.05rem .6rem;border-radius:1rem;border:1px solid}
.pill.yes{color:var(--good)}.pill.no{color:var(--bad)}.pill.cannot{color:var(--dim)}
.shown{margin:0;min-width:0;break-inside:avoid}.shown>p{margin:0 0 .7rem;font-size:.88rem}.shown .bars{margin-top:.6rem}
details{margin:.4rem 0}summary{cursor:pointer;padding:.3rem 0;font-weight:600}
@media (max-width:640px){th,td{padding-right:.8rem}.tiles b{font-size:1.3rem}tbody th{min-width:8rem}.tiles{grid-template-columns:1fr 1fr}.bars{grid-template-columns:1fr;gap:0}.bars dd{margin-bottom:.5rem}
.claims thead{display:none}.claims tr,.claims td{display:block;border:0;padding:0 0 .3rem}.claims tbody th{display:inline;position:static;border:0;padding:0 .6rem 0 0}
.claims td:first-of-type{display:inline}.claims tr{border-bottom:1px solid var(--line);padding:.7rem 0}}
@media print{main{max-width:none;padding:0}body{font-size:11pt}.hit{display:none}.scroll{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}details::details-content{content-visibility:visible;height:auto}}
"""
