"""Several reports as one."""

import io

import pytest
from rich.console import Console

from raypipe.insight import report as reports
from raypipe.insight.merged import merged, summary


def of(images: int, rejected: int = 0, **more) -> dict:
    counts = reports.Counts(
        images_in=images + rejected,
        images_out=images,
        rejects_by_reason={"corrupt": rejected} if rejected else {},
    )
    return reports.unmeasured(run_id="r", settings={}, versions={}, counts=counts) | more


def stage(images: int, cpu_s: float | None) -> dict:
    return {
        "name": "preprocess",
        "images": images,
        "cpu_s_per_image": cpu_s,
        "busy_s_per_image": None,
    }


def test_counts_are_summed_and_costs_are_those_of_all_images():
    one = of(30, 2, wall_s=10.0, images_per_s=3.2, stages=[stage(32, 0.010)])
    other = of(90, 1, wall_s=20.0, images_per_s=4.5, stages=[stage(96, 0.002)])
    cut_off = of(5, stages=[stage(5, None)])
    all_ = merged([one, other, cut_off])
    assert (all_["images_in"], all_["images_out"], all_["images_rejected"]) == (128, 125, 3)
    assert all_["rejects_by_reason"] == {"corrupt": 3}
    assert (all_["wall_s"], all_["images_per_s"]) == (30.0, 7.7)
    (found,) = all_["stages"]
    assert found["images"] == 133 and found["busy_s_per_image"] is None
    assert found["cpu_s_per_image"] == pytest.approx((32 * 0.010 + 96 * 0.002) / 128)
    assert merged([cut_off])["wall_s"] is None


def test_a_summary_names_what_is_missing():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary({"out/a": of(3), "out/b": of(4, 1)}, ["out/c"]))
    told = console.export_text()
    assert "no report yet: out/c" in told and "rejected: 1 corrupt" in told
    assert [line.split()[:4] for line in told.splitlines() if " all " in f" {line} "] == [
        ["all", "8", "7", "1"]
    ]
