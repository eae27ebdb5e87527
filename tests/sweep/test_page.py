"""The sweep's page, read back with an HTML parser."""

import re
from itertools import pairwise

import pytest

from raypipe.insight.markup import DASH
from raypipe.sweep import page
from raypipe.sweep.charts import Series, chart
from raypipe.sweep.curves import Where
from tests.support.pages import HOSTILE, Element, Reader, figure, section, shape
from tests.sweep.played import OPENCV, TORCHVISION, Library, record, sweep, training

ABOUT = {
    "command": "python jobs/sweep.py --input photos --output out",
    "date": "2026-11-24",
    "settings": {"input": "photos", "limit": 1000},
    "versions": {"ray": "2.60.0"},
    "hardware": {"cores": 16.0, "processor": "an EPYC"},
}
SLOW = {
    name: Library(cpu_s=0.002, encode_s=0.0005, waits_s=0.05) for name in ("opencv", "torchvision")
}


def rows() -> list[dict]:
    return sweep(cores=16) + training()


def read(records=None, where: Where | None = None, about=None) -> Element:
    return Reader(
        page.page(
            rows() if records is None else records, where or Where(cores=16, gpus=4), about or ABOUT
        )
    ).open[0]


def drawn(html: str) -> Element:
    return Reader(html).open[0]


def line(name: str, *points: tuple[float, float], **more) -> Series:
    return Series(name=name, colour="s0", points=[(x, y, y, y) for x, y in points], **more)


def test_every_claim_that_a_sweep_can_judge_has_a_row_and_a_verdict():
    listed = section(read(), "Claims").all("tbody")[0].all("tr")
    assert [row.all("th")[0].text for row in listed] == [
        str(n) for n in (*range(5, 15), *range(17, 22))
    ]
    for row in listed:
        assert row.elements[-1].text in page.HOLDS.values()
        assert re.fullmatch(r"\d\d:\d\d", row.elements[1].text)


def test_the_headline_counts_the_verdicts():
    tree = read()
    said = [row.elements[-1].text for row in section(tree, "Claims").all("tbody")[0].all("tr")]
    counts = [said.count(page.HOLDS[holds]) for holds in ("yes", "no", "cannot")]
    assert tree.all("h1")[
        0
    ].text == "{} of the talk's 15 claims hold here, {} do not, {} cannot be shown.".format(*counts)


def test_every_claim_with_a_figure_has_it_and_is_named_beside_it():
    tree = read()
    beside = [
        re.match(r"(\d+)\. ", p.text)
        for shown in tree.all("div", class_="shown")
        for p in shown.all("p")
    ]
    assert {int(found[1]) for found in beside if found} == {*range(5, 15), 17, 18, 19, 20}


def test_without_training_there_are_no_figures_of_it():
    titles = {e.text for e in read(sweep(cores=16)).all("h3")}
    assert "Preprocessing only: time" in titles and not [
        t for t in titles if t.startswith("Training")
    ]


def test_a_sweep_of_nothing_much_has_a_page():
    assert read(sweep(cores=2, actors=(1,), writing=("none",)), Where(cores=2))
    bare = [
        dict.fromkeys(row)
        | {
            k: row[k]
            for k in ("kind", "backend", "actors", "writers", "workers", "device", "threads")
        }
        for row in rows()
    ]
    assert DASH in read(bare, about={}).text


def test_delays_are_told_beside_every_figure():
    tree = read(sweep(cores=16, libraries=SLOW), Where(cores=16, store_ms=50, read_ms=5))
    figures = tree.all("div", class_="shown")
    assert len(figures) >= 9
    for shown in figures:
        assert "Every image takes 5 ms longer to read and 50 ms longer to write" in shown.text
    assert "longer to" not in read().text


def test_a_disturbed_machine_is_told_at_the_top():
    loud = [row | {"cpu_percent": 100.0} for row in sweep(cores=64, actors=(1, 2, 4))]
    assert (
        "Other programs held about"
        in read(loud, Where(cores=64)).all("strong", class_="bad")[0].text
    )
    assert "Other programs" not in read().text


def test_nothing_in_the_page_can_run_or_load():
    tree = read()
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
        "img",
    }
    for element in tree.all():
        assert not [
            name for name in element.attributes if name.startswith("on") or name in ("href", "src")
        ]
    document = page.page(rows(), Where(cores=16), ABOUT)
    assert "http" not in document.replace("http-equiv", "")
    assert not re.search(r"url\(|@import", document)


def test_hostile_text_stays_text():
    def about(word: str) -> dict:
        return {
            "command": word,
            "date": word,
            **{part: {f"{word}1": word} for part in ("settings", "versions")},
            "hardware": {"processor": word, "cores": 2},
        }

    def records(word: str) -> list[dict]:
        return [row | {"limit": word, "run_id": word} for row in rows()]

    hostile, plain = (read(records(word), about=about(word)) for word in (HOSTILE, "plain"))
    assert shape(hostile) == shape(plain)
    assert hostile.text.count("<img src=x onerror=alert(1)>") > 5


def test_time_is_drawn_to_one_scale_so_that_figures_can_be_compared():
    tree = read(sweep(cores=16, libraries=SLOW), Where(cores=16))
    scales = []
    for title in (
        "Preprocessing only: time",
        "One writer: time",
        "As many writers as actors: time",
    ):
        labels = [t for t in figure(tree, title).all("text") if t.attributes.get("x") == "-6"]
        scales.append([t.text for t in labels])
    assert scales[0] == scales[1] == scales[2] and scales[0][-1] == "100"


def test_points_with_more_actors_than_cores_are_hollow_and_the_cores_are_marked():
    shown = figure(read(sweep(cores=4), Where(cores=4)), "Preprocessing only: time")
    marks = [e.attributes["class"] for e in shown.all("circle", class_="mark")]
    assert (
        len(marks) == 14 and len([c for c in marks if "hollow" in c]) == 8
    )  # 8, 10, 16 and 20, of two libraries
    assert [e.text for e in shown.all("text", class_="said")] == ["4 cores"]
    assert len(shown.all("path", class_="ideal")) == 2


def test_three_bars_a_library():
    shown = next(e for e in read().all("figure") if "One writer, 10 writers, none" in e.text)
    assert [e.text for e in shown.all("dt")][:3] == [
        "OpenCV, 1 writer",
        "OpenCV, 10 writers",
        "OpenCV, nothing written",
    ]


def test_advice_has_a_row_for_each_budget():
    listed = section(read(), "Which library, and how many of what").all("tbody")[0].all("tr")
    assert [row.elements[0].text for row in listed] == ["1", "2", "4", "8", "16", "32", "64"]
    assert {row.elements[1].text for row in listed} == {"OpenCV"}
    assert (
        "to preprocess" in listed[3].elements[2].text and "to write" in listed[3].elements[2].text
    )


def test_break_even_is_told_with_and_without_training():
    listed = section(read(), "Once, or in every epoch").all("tbody")[0].all("tr")
    assert [[cell.text for cell in row.elements][:2] for row in listed][:2] == [
        ["OpenCV", "as fast as data comes"],
        ["OpenCV", "50 images/s"],
    ]
    assert (
        listed[0].elements[-1].text == "from 2 epochs on" and listed[1].elements[-2].text == "never"
    )


# --- charts -------------------------------------------------------------------------------------


def test_counts_stand_apart_as_their_ratios():
    shown = drawn(
        chart("t", "s", [line("a", (1, 8), (2, 4), (4, 2), (8, 1))], along="actors", span=(1, 10))
    )
    points = [
        tuple(map(float, p.split()))
        for p in shown.all("path")[0].attributes["d"].removeprefix("M").split("L")
    ]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]
    assert all(
        step == pytest.approx(steps[0], abs=0.5) for step in steps
    )  # halving time at twice the actors is a straight line down
    assert points[0][0] == 30 and points[-1][0] == 970


def test_an_axis_of_ratios_has_room_for_its_span_and_one_from_zero_begins_there():
    def labels(html: str) -> list[str]:
        return [t.text for t in drawn(html).all("text") if t.attributes.get("x") == "-6"]

    assert labels(chart("t", "s", [line("a", (1, 3), (2, 7))], along="x", span=(3, 7))) == [
        "2",
        "5",
        "10",
    ]
    assert labels(chart("t", "%", [line("a", (1, 30), (2, 70))], along="x", top=100)) == [
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
    ]


def test_a_count_whose_label_would_cover_another_keeps_its_tick():
    shown = drawn(
        chart("t", "s", [line("a", *((n, 1.0) for n in range(1, 21)))], along="x", span=(1, 2))
    )
    said = [t.text for t in shown.all("text") if t.attributes.get("dy") == "1.5em"]
    assert "1" in said and "20" in said and "19" not in said
    assert len([e for e in shown.all("line", class_="grid") if e.attributes.get("x1")]) == 20


def test_a_mark_outside_of_what_was_counted_is_left_out():
    assert not drawn(chart("t", "s", [line("a", (1, 1))], along="x", mark=(64, "64 cores"))).all(
        "line", class_="event"
    )


def test_repeats_are_shown_from_the_lowest_to_the_highest():
    series = Series(name="a", colour="s1", points=[(1, 50, 25, 75)])
    shown = drawn(chart("t", "%", [series], along="x", top=100))
    (range_,) = shown.all("line", class_="range")
    assert (range_.attributes["y1"], range_.attributes["y2"]) == ("75%", "25%")
    assert [t.text for t in shown.all("title")] == ["a, 1 x: 50 % (25 to 75)"]


def test_a_chart_of_nothing_is_nothing():
    assert chart("t", "s", [], along="x") == ""


def test_actors_that_write_themselves_have_a_figure_and_change_no_claim():
    talks = sweep(cores=16)
    fused = [
        record(backend, library, cores=16, actors=count, kind="fused")
        for backend, library in (("opencv", OPENCV), ("torchvision", TORCHVISION))
        for count in (1, 2, 4)
    ]
    before, after = (read(rows, Where(cores=16)) for rows in (talks, [*talks, *fused]))
    title = "Actors that write themselves: time"
    assert title not in before.text and title in after.text
    claims = [section(tree, "Claims").text for tree in (before, after)]
    assert claims[0] == claims[1]
    drawn_ = next(one for one in after.all("figure") if title in one.text)
    assert "as many writers" in drawn_.text
