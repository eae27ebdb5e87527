"""The report as a page, read back with an HTML parser: a file name never becomes markup."""

import base64
import copy
import json
import re
from html.parser import HTMLParser

import pytest

from raypipe.insight.figures import COLUMNS
from raypipe.insight.html import page
from raypipe.insight.markup import DASH

HOSTILE = (
    "</script></style></title>--><img src=x onerror=alert(1)>\"' onload='alert(1)"
    "\n\r\t\0\u202egpj.exe\u2066\udc80&lt;&#x27;"
)
JPEG = b"\xff\xd8\xff\xe0 not much of a picture \xff\xd9"
VOID = {"meta", "img", "br"}


def bucket(t_s: float, stage: str, **figures) -> dict:
    known = {
        "actors": 2,
        "images_per_s": 100.0,
        "cpu_cores": 1.5,
        "rss_bytes": 400_000_000,
        "gpu_percent": 80.0,
    }
    return {
        "t_s": t_s,
        "stage": stage,
        **known,
        "busy": 0.5,
        "starved": 0.25,
        "blocked": 0.25,
        "queued": 1,
        **figures,
    }


def stage(name: str, **figures) -> dict:
    counts = {"start": 2, "min": 2, "max": 4, "end": 3}
    cost = {
        "images": 1000,
        "cpu_s_per_image": 0.00575,
        "busy_s_per_image": 0.01,
        "cpu_percent": 38.2,
        "rss_peak_bytes": 536_000_000,
        "private_peak_bytes": 336_000_000,
    }
    gpu = {
        "gpu_percent": 91.0,
        "gpu_memory_peak_bytes": 17_300_000_000,
        "bytes_in": 16_900_000,
        "bytes_out": 54_000_000,
    }
    return {
        "name": name,
        "actors": counts,
        **cost,
        **gpu,
        "busy": 0.77,
        "starved": 0.02,
        "blocked": 0.21,
        **figures,
    }


def report(**changes) -> dict:
    advice = [
        {"change": "preprocess actors 4 -> 5", "predicted_images_per_s": 250.0},
        {"change": "write actors 4 -> 5", "predicted_images_per_s": 200.0},
    ]
    return {
        "run_id": "20261124-085752-f6e3",
        "settings": {"input": "photos", "limit": None, "resume": True},
        "versions": {"ray": "2.60.0"},
        "hardware": {"cores": 16, "nodes": 2, "memory_bytes": 25_276_063_744},
        "images_in": 1000,
        "images_out": 990,
        "images_rejected": 10,
        "images_done_before": 100,
        "rejects_by_reason": {"truncated": 3, "not an image": 7},
        "setup_s": 3.0,
        "wall_s": 7.5,
        "first_output_s": 1.25,
        "images_per_s": 133.0,
        "steady_images_per_s": 200.0,
        "cpu_percent": 63.3,
        "stages": [stage("preprocess"), stage("write")],
        "verdict": {
            "stage": "preprocess",
            "reason": "preprocess limits: it is busy. More would help.",
            "advice": advice,
        },
        "predicted": {
            "images_per_s": 250.0,
            "measured_images_per_s": 200.0,
            "actors": {"preprocess": 4, "write": 3},
        },
        "scale_events": [{"t_s": 4.0, "stage": "write", "from": 2, "to": 3}],
        "timeline": [bucket(float(t), name) for t in range(8) for name in ("preprocess", "write")],
        **changes,
    }


def reject(**changes) -> dict:
    return {
        "image_id": "1",
        "uri": "photos/1.jpg",
        "reason": "truncated",
        "detail": "",
        "thumbnail": JPEG,
        **changes,
    }


class Element:
    def __init__(self, tag: str, attributes: dict[str, str]):
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    def all(self, tag: str | None = None, **attributes: str) -> list["Element"]:
        """Elements below, of this tag, whose attributes are or (class) contain these."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                has = all(
                    value in child.attributes.get(key.rstrip("_"), "").split(" ")
                    for key, value in attributes.items()
                )
                found += ([child] if has and tag in (None, child.tag) else []) + child.all(
                    tag, **attributes
                )
        return found

    @property
    def elements(self) -> list["Element"]:
        return [child for child in self.children if isinstance(child, Element)]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Reader(HTMLParser):
    """Builds the tree and fails where an element is not closed in order."""

    def __init__(self, document: str):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(document)
        self.close()
        assert len(self.open) == 1, f"left open: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(*args, **kwargs) -> Element:
    return Reader(page(*args, **kwargs)).open[0]


def section(tree: Element, title: str) -> Element:
    return next(s for s in tree.all("section") if s.all("h2")[0].text == title)


def figure(tree: Element, title: str) -> Element:
    return next(f for f in tree.all("figure") if f.all("h3")[0].text == title)


def cells(tree: Element, title: str, row: str) -> list[str]:
    found = next(r for r in section(tree, title).all("tr") if r.all("th")[0].text == row)
    return [cell.text for cell in found.all("td")]


def filled(value, text: str):
    """`value` with `text` in place of every string, and of the keys that come from outside."""
    if isinstance(value, dict):
        outside = {"versions", "settings", "hardware", "rejects_by_reason"}
        return {
            key: {f"{text}{i}": filled(v, text) for i, v in enumerate(inner.values())}
            if key in outside
            else filled(inner, text)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [filled(item, text) for item in value]
    return text if isinstance(value, str) else value


def shape(tree: Element) -> list[tuple[str, list[str]]]:
    return [(element.tag, sorted(element.attributes)) for element in tree.all()]


def test_a_training_has_its_epochs_and_whether_storing_pays():
    epoch = {
        "epoch": 0,
        "loss": 2.5,
        "map": 0.125,
        "map50": 0.25,
        "images": 450,
        "images_per_s": 80.0,
        "wait_share": 0.1,
    }
    training = {
        "epochs": [epoch, {**epoch, "epoch": 1, "map": None}],
        "accelerator_utilisation": 0.75,
        "wait_share": 0.2,
    }
    content = page(
        report(train={**training, "break_even": {"epochs": 3.2, "reason": "from 4 <epochs> on"}})
    )
    assert "in steps for 75% of their time and waited for data for 20%" in content
    assert "from 4 &lt;epochs&gt; on" in content
    assert "0.12" in content and "<h2>Training</h2>" in content
    assert "<h2>Training</h2>" not in page(report())


def test_hostile_text_stays_text_wherever_it_stands():
    hostile, plain = (
        read(filled(report(), text), rejects=[filled(reject(detail="x"), text)])
        for text in (HOSTILE, "plain")
    )
    # The very same elements with the very same attributes, whatever the strings hold.
    assert shape(hostile) == shape(plain)
    assert hostile.text.count("<img src=x onerror=alert(1)>") > 40


def test_nothing_in_the_page_can_run_or_load():
    tree = read(filled(report(), HOSTILE), rejects=[filled(reject(), HOSTILE)])
    assert not {e.tag for e in tree.all()} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
        "image",
        "use",
    }
    for element in tree.all():
        assert not [name for name in element.attributes if name.startswith("on") or name == "href"]
        assert element.attributes.get("src", "data:image/jpeg;").startswith("data:image/jpeg;")
    assert not re.search(r"url\(|@import|expression", tree.all("style")[0].text)
    policy = next(
        e for e in tree.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"
    ).attributes["content"]
    assert (
        policy.split("; ")[0] == "default-src 'none'"
        and "script-src" not in policy
        and "http" not in policy
    )


def test_what_cannot_be_printed_is_spelled_out():
    document = page(
        report(run_id=HOSTILE, settings={HOSTILE: HOSTILE}), rejects=[reject(uri=HOSTILE)]
    )
    document.encode("utf-8")  # a lone surrogate could not
    assert all(character.isprintable() or character == "\n" for character in document)
    assert "\\u202egpj.exe" in document and "\\udc80" in document and "\\n\\r\\t\\x00" in document


def test_the_parts_come_in_order():
    tree = read(report())
    headings = [e for e in tree.all() if re.fullmatch("h[1-6]", e.tag)]
    assert [(e.tag, e.text) for e in headings if e.tag != "h3"] == [
        ("h1", "preprocess limits: it is busy."),
        ("h2", "Key figures"),
        ("h2", "Over time"),
        ("h2", "Stages"),
        ("h2", "Predicted against measured"),
        ("h2", "Rejects"),
        ("h2", "How it was run"),
    ]
    assert [e.text for e in headings if e.tag == "h3"] == [
        *("Throughput", "Actors", "preprocess", "write", "CPU", "Memory (RSS)", "GPU")
    ]


def test_advice_tells_the_gain_over_what_was_measured():
    rows = [
        [cell.text for cell in row.elements] for row in read(report()).all("tbody")[0].all("tr")
    ]
    assert rows == [["preprocess actors 4→5", "250", "+25%"], ["write actors 4→5", "200", "none"]]


def test_without_a_measured_rate_there_is_no_gain():
    rows = read(report(steady_images_per_s=None, images_per_s=None)).all("tbody")[0].all("tr")
    assert [row.elements[2].text for row in rows] == [DASH, DASH]


def test_key_figures():
    tiles = {
        tile.all("dt")[0].text: tile.all("dd")[0].text
        for tile in section(read(report()), "Key figures").all("div")
    }
    assert tiles["images in"] == "1,000= 990 out + 10 rejected; 100 of them by an earlier run"
    assert tiles["images/s, steady"].startswith("200") and tiles["images/s, overall"].startswith(
        "133"
    )
    assert tiles["first output"].startswith("1.25 s") and tiles["wall time"].startswith("7.50 s")
    assert tiles["CPU of the machine"].startswith("63.3%") and tiles["cores"].startswith("16")


def test_lost_images_are_not_kept_quiet():
    assert (
        "3 lost"
        in section(read(report(images_out=987)), "Key figures").all("strong", class_="bad")[0].text
    )


def test_images_that_were_not_read_are_not_lost_and_what_was_left_out_is_said():
    found = report(images_out=987, images_unread=3, skipped={"<b>.cr2": 12}, boxes_dropped=2)
    figures = section(read(found), "Key figures")
    assert not figures.all("strong", class_="bad")
    assert "987 out + 10 rejected + 3 not read" in figures.all("dd")[0].text
    assert figures.all("p")[0].text == "left out of the listing: 12 <b>.cr2"
    assert "2 boxes could not be used" in figures.all("p")[1].text


def test_what_was_not_measured_is_a_dash_and_never_0():
    nothing = {key: None for key in stage("x") if key not in ("name", "actors")}
    tree = read(
        report(
            stages=[
                stage("preprocess"),
                stage("write", **nothing),
                stage("train", **dict.fromkeys(nothing, 0)),
            ]
        )
    )
    rows = {row.all("th")[0].text: row.all("td") for row in section(tree, "Stages").all("tr")[1:]}
    assert len(rows) == 15
    for name, (full, empty, zero) in rows.items():
        if name not in ("actors", "shares of its time"):
            assert (full.text != DASH, empty.text, zero.text[0]) == (True, DASH, "0"), name
    tiles = read(dict.fromkeys(report())).all("dl", class_="tiles")[0].all("b")
    assert [tile.text for tile in tiles] == [DASH] * 7


def test_an_infinite_or_strange_figure_is_not_a_figure():
    tree = read(
        report(
            stages=[
                stage(
                    "a",
                    images=float("nan"),
                    cpu_percent=float("inf"),
                    bytes_in="1",
                    bytes_out=10**400,
                    busy=True,
                )
            ]
        )
    )
    for row in ("images", "CPU, of all cores", "read", "put out", "busy"):
        assert cells(tree, "Stages", row) == [DASH]


def test_a_report_of_any_age_has_a_page():
    assert "This report has no verdict." in read({}).text
    full = report()
    for key in full:
        read({k: v for k, v in full.items() if k != key})
        read({**full, key: None})
    for place, key in [("stages", k) for k in stage("x")] + [
        ("timeline", k) for k in bucket(0.0, "x")
    ]:
        read({**full, place: [{k: v for k, v in row.items() if k != key} for row in full[place]]})
    assert "Nothing was measured over time" in read(report(timeline=[])).text


def test_a_figure_without_a_single_value_is_left_out():
    rows = [bucket(float(t), "preprocess", gpu_percent=None, busy=None) for t in range(5)]
    titles = [e.text for e in read(report(timeline=rows)).all("h3")]
    assert titles == ["Throughput", "Actors", "CPU", "Memory (RSS)"]


def test_times_that_no_run_has_break_nothing():
    rows = [
        bucket(t_s, "preprocess")
        for t_s in (1e-300, 2e-300, 3e-300, 4e-300, 1.0, 1e20, -5.0, float("nan"))
    ]
    assert figure(read(report(timeline=rows)), "Throughput")


def path(tree: Element, title: str, place: int = 0) -> str:
    return figure(tree, title).all("path")[place].attributes["d"]


def test_a_line_stands_where_its_values_are():
    rows = [
        bucket(0.0, "preprocess", images_per_s=0.0),
        bucket(1.0, "preprocess", images_per_s=100.0),
    ]
    tree = read(report(timeline=rows, wall_s=2.0, scale_events=[]))
    assert path(tree, "Throughput") == "M250 1000L750 0"
    labels = [t.text for t in figure(tree, "Throughput").all("svg", class_="plot")[0].all("text")]
    assert "100" in labels and "seconds since the start" in labels
    assert figure(tree, "Throughput").all("span", class_="unit")[0].text == "images/s"


def test_a_long_gap_breaks_a_line_and_a_second_without_a_report_does_not():
    rows = [bucket(float(t), "preprocess") for t in (0, 1, 3, 4, 20, 21)]
    tree = read(report(timeline=rows))
    assert path(tree, "Throughput").count("M") == 2
    assert path(tree, "Actors").count("M") == 2
    assert path(tree, "preprocess").count("Z") == 2


def test_a_run_of_one_second_is_seen():
    tree = read(report(timeline=[bucket(0.0, "preprocess")], wall_s=0.8, scale_events=[]))
    assert path(tree, "Throughput") == "M0 0L1000 0"


def test_busy_starved_and_blocked_are_stacked_to_100_percent():
    rows = [
        bucket(0.0, "preprocess", busy=0.25, starved=0.15, blocked=0.1)
    ]  # shares of a half: what is known makes up the whole
    tree = read(report(timeline=rows, wall_s=1.0, scale_events=[]))
    drawn = figure(tree, "preprocess").all("path")
    assert [p.attributes["class"].split()[1] for p in drawn] == ["blocked", "starved", "s0"]
    assert [re.findall(r"V([\d.]+)H1000", p.attributes["d"]) for p in drawn] == [
        ["0"],
        ["200"],
        ["500"],
    ]
    assert "busy 50, starved 30, blocked 20" in figure(tree, "preprocess").all("title")[0].text


def test_actors_are_steps():
    rows = [bucket(float(t), "preprocess", actors=n) for t, n in enumerate([1, 1, 4, 4])]
    tree = read(report(timeline=rows, wall_s=4.0, scale_events=[]))
    assert path(tree, "Actors") == "M0 750V750H250V750H500V0H750V0H1000"


def test_memory_of_0_bytes_is_a_second_without_a_report():
    rows = [bucket(float(t), "preprocess", rss_bytes=size) for t, size in enumerate([2e9, 0, 2e9])]
    tree = read(report(timeline=rows, wall_s=3.0, scale_events=[]))
    assert path(tree, "Memory (RSS)") == "M166.7 0L833.3 0"


def test_a_stage_has_one_colour_in_all_figures():
    tree = read(report())
    colours = {
        (e.text, e.attributes["class"])
        for e in tree.all("span", class_="key")
        if e.text in ("preprocess", "write")
    }
    assert colours == {("preprocess", "key s0"), ("write", "key s1")}
    for title in ("Throughput", "Actors", "CPU", "Memory (RSS)", "GPU"):
        assert [p.attributes["class"].split()[1] for p in figure(tree, title).all("path")] == [
            "s0",
            "s1",
        ]


def test_scale_events_are_marked_and_named():
    tree = read(
        report(
            scale_events=[
                {"t_s": 4.0, "stage": "write", "from": 2, "to": 3},
                {"t_s": 2.0, "stage": "gone", "from": 1, "to": 9},
            ]
        )
    )
    for title in ("Throughput", "CPU", "write"):
        lines = [e.attributes for e in figure(tree, title).all("line", class_="event")]
        assert [(line["x1"], line["class"]) for line in lines] == [
            ("25%", "event none"),
            ("50%", "event s1"),
        ]
    assert [e.text for e in figure(tree, "Throughput").all("text", class_="said")] == [
        "gone 1→9",
        "write 2→3",
    ]
    assert [
        [c.text for c in row.elements]
        for row in section(tree, "Over time").all("tbody")[0].all("tr")
    ] == [
        ["2 s", "gone 1→9"],
        ["4 s", "write 2→3"],
    ]


def test_labels_of_events_do_not_cover_one_another():
    events = [{"t_s": 1.0 + i / 100, "stage": "write", "from": i, "to": i + 1} for i in range(30)]
    shown = figure(read(report(scale_events=events)), "Throughput")
    labels = [(e.attributes["x"], e.attributes["y"]) for e in shown.all("text", class_="said")]
    assert len(shown.all("line", class_="event")) == 30
    assert (
        len(labels) == len({y for _, y in labels}) == 4
    )  # as many rows as there are; the others are in the list


def test_a_long_run_makes_no_big_page():
    rows = [bucket(float(t), s) for t in range(3600) for s in ("preprocess", "write", "train")]
    document = page(report(timeline=rows, wall_s=3600.0))
    assert len(document) < 400_000
    tree = Reader(document).open[0]
    assert len(path(tree, "Throughput").split("L")) <= COLUMNS
    assert path(tree, "Throughput").count("M") == 1
    assert "minutes since the start" in figure(tree, "Throughput").text


def test_points_of_a_long_run_are_means():
    rows = [bucket(float(t), "preprocess", images_per_s=float(t % 2)) for t in range(2 * COLUMNS)]
    summary = (
        figure(read(report(timeline=rows)), "Throughput").all("svg")[0].attributes["aria-label"]
    )
    assert "preprocess: mean 0.50, highest 0.50." in summary


def test_figures_can_be_heard():
    for shown in read(report()).all("figure"):
        plot = shown.all("svg", class_="plot")[0]
        assert plot.attributes["role"] == "img"
        assert re.search(
            r"over 8 s\. .*: mean [\d.]+, highest [\d.]+\.", plot.attributes["aria-label"]
        )


def test_predicted_stands_beside_measured():
    shown = section(read(report()), "Predicted against measured").text
    assert "250 images/s" in shown and "200 images/s" in shown
    assert "Measured is 20% below predicted. Planned actors: preprocess 4, write 3." in shown
    assert "Predicted against measured" not in read(report(predicted=None)).text


def test_rejects_by_reason_then_a_few_of_them():
    row = reject(image_id="cat", uri="photos/cat.jpg", detail="ends after 3 bytes")
    tree = section(read(report(), rejects=[row, reject(thumbnail=None)], more_rejects=8), "Rejects")
    assert [e.text for e in tree.all("dt")] == ["not an image", "truncated"]
    assert [e.text for e in tree.all("dd")] == ["7 (0.70%)", "3 (0.30%)"]
    first, second = tree.all("li")
    assert (
        base64.b64decode(
            first.all("img")[0].attributes["src"].removeprefix("data:image/jpeg;base64,")
        )
        == JPEG
    )
    assert all(
        word in first.text for word in ("cat", "photos/cat.jpg", "truncated", "ends after 3 bytes")
    )
    assert not second.all("img") and "no picture" in second.text
    assert "and 8 further" in tree.text


def test_no_rejects_is_said():
    assert "No image was rejected." in section(read(report(rejects_by_reason={})), "Rejects").text


def test_settings_are_collapsed_and_complete():
    details = {
        d.all("summary")[0].text: d
        for d in section(read(report()), "How it was run").all("details")
    }
    assert list(details) == ["Settings", "Versions", "Hardware"]
    assert not any("open" in d.attributes for d in details.values())
    rows = [[cell.text for cell in row.elements] for row in details["Settings"].all("tr")]
    assert rows == [["input", "photos"], ["limit", DASH], ["resume", "true"]]
    assert "25.3 GB" in details["Hardware"].text


def test_a_page_is_a_function_of_its_report():
    one, rows = report(), [reject()]
    before = copy.deepcopy((one, rows))
    assert page(one, rejects=rows) == page(json.loads(json.dumps(one)), rejects=rows)
    assert (one, rows) == before


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, DASH),
        (0.0123, "0.012 s"),
        (119.4, "119 s"),
        (125.0, "2 min 5 s"),
        (9000.0, "2 h 30 min"),
    ],
)
def test_durations(seconds, said):
    tiles = {
        t.all("dt")[0].text: t.all("b")[0].text
        for t in section(read(report(wall_s=seconds)), "Key figures").all("div")
    }
    assert tiles["wall time"] == said
