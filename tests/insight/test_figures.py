"""The figures of report.html, read back with an HTML parser."""

import re

from raypipe.insight.figures import COLUMNS
from raypipe.insight.html import page
from tests.support.pages import Element, Reader, bucket, figure, read, report, section


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
