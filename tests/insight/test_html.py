"""The report as a page, read back with an HTML parser: a file name never becomes markup."""

import base64
import copy
import json
import re

import pytest

from raypipe.insight.html import page
from raypipe.insight.markup import DASH
from tests.support.pages import (
    HOSTILE,
    JPEG,
    bucket,
    cells,
    filled,
    read,
    reject,
    report,
    section,
    shape,
    stage,
)


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
