"""Claims judged from played sweeps: machines where each holds, does not, or cannot be shown."""

import math
import re

import pytest

from raypipe.sweep.advice import choices, designs, gpus
from raypipe.sweep.claims import Finding, findings, too_short
from raypipe.sweep.curves import Where, curve, full_at, ideal, others, slope, three
from tests.sweep.played import OPENCV, TORCHVISION, Library, record, sweep, training

FAST_STORE = Library(cpu_s=0.002, encode_s=0.00001)
SLOW_STORE = {
    "opencv": Library(cpu_s=0.002, encode_s=0.0005, waits_s=0.05),
    "torchvision": Library(cpu_s=0.003, encode_s=0.0005, waits_s=0.05),
}


def judged(rows: list[dict], *, cores: float = 64, **where) -> dict[int, Finding]:
    return {finding.claim: finding for finding in findings(rows, Where(cores=cores, **where))}


def verdicts(rows: list[dict], **where) -> dict[int, str]:
    return {claim: finding.holds for claim, finding in judged(rows, **where).items()}


def test_the_slope_is_minus_one_where_twice_as_many_take_half_the_time():
    spots = curve(sweep(cores=64), backend="opencv")
    assert [spot.count for spot in spots] == [1, 2, 4, 8, 10, 16, 20]
    assert slope(spots) == pytest.approx(-1)
    assert slope(curve(sweep(cores=1), backend="opencv")) == pytest.approx(0)


def test_one_actor_with_one_writer_is_on_both_lines():
    rows = sweep(cores=64, actors=(1, 4))
    assert [spot.count for spot in curve(rows, backend="opencv", writing="one")] == [1, 4]
    assert [spot.count for spot in curve(rows, backend="opencv", writing="same")] == [1, 4]


def test_a_spot_is_the_median_of_its_repeats_and_takes_no_heed_of_what_is_not_known():
    rows = [
        record("opencv", OPENCV, cores=2, actors=1, repeat=i, time_s=t)
        for i, t in enumerate((9.0, 2.0, None, 3.0, math.nan))
    ]
    (spot,) = curve(rows, backend="opencv")
    assert spot.median("time_s") == 3.0
    assert spot.values("time_s") == [9.0, 2.0, 3.0]
    assert spot.median("gpu_percent") is None


def test_the_ideal_bends_where_the_measured_cpu_fills_the_cores():
    spots = curve(sweep(cores=4), backend="opencv")
    assert full_at(spots, 4) == pytest.approx(4)
    assert [time_s for _, time_s in ideal(spots, 4)] == pytest.approx(
        [2.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    )
    waiting = curve(sweep(cores=2, libraries=SLOW_STORE), backend="opencv", writing="same")
    assert full_at(waiting, 2) == pytest.approx(2 / (0.0025 / 0.0505))  # waiting takes no core


def test_on_many_cores_the_talk_s_writing_holds_where_storing_is_the_slower():
    slow = {
        "opencv": Library(cpu_s=0.002, encode_s=0.0022),
        "torchvision": Library(cpu_s=0.004, encode_s=0.0045),
    }
    found = verdicts(sweep(cores=64, libraries=slow))
    assert {found[claim] for claim in (5, 7, 9, 10, 11)} == {"yes"}
    assert found[13] == "no"  # encoding takes CPU of its own


def test_with_a_slow_store_the_same_holds_on_two_cores():
    found = judged(sweep(cores=2, actors=(1, 2, 4, 8), libraries=SLOW_STORE), cores=2, store_ms=50)
    assert {found[claim].holds for claim in (5, 7, 8, 9, 10)} == {"yes"}
    assert "slope -1.00 (2→1 s from 1 to 2 actors; the cores are full at 2)" in found[5].measured
    assert (
        "slope +0.00" in found[7].measured and "50.5→50.5 s from 1 to 8 actors" in found[7].measured
    )
    assert (
        found[11].holds == "yes"
        and "8 actors: 50.5 s with 1 writer" in found[11].measured
        and "1 s without: 89%" in found[11].measured
    )


def test_writers_that_bring_little_contradict_the_talk():
    rows = [
        row | ({"time_s": 30.0} if 1 < row["writers"] == row["actors"] else {})
        for row in sweep(cores=64, libraries=SLOW_STORE)
    ]
    assert verdicts(rows)[11] == "no"
    # A full disk: as many writers as actors take as long as one, and much longer than none.
    full = [row | ({"time_s": 30.0} if row["writers"] else {}) for row in sweep(cores=64)]
    assert verdicts(full)[11] == "no"


def test_two_cores_that_compute_cannot_show_what_writing_costs_and_it_is_said_why():
    found = judged(sweep(cores=2, actors=(1, 2, 4, 8)), cores=2)
    for claim in (7, 8, 9):
        assert found[claim].holds == "cannot"
        assert "2 cores are full before the one writer is; --store-ms" in found[claim].why
    assert found[10].holds == "cannot" and "of the 2 cores are in use already" in found[10].why
    assert found[11].holds == "cannot"


def test_what_ray_takes_of_two_cores_is_no_fault_of_the_actors():
    rows = [
        row | {"overhead_cpu_s": 0.3 * row["preprocess_cpu_s"]}
        for row in sweep(cores=2, actors=(1, 2, 4))
    ]
    assert full_at(curve(rows, backend="opencv"), 2) == pytest.approx(2 / 1.3)
    found = judged(
        [row | {"time_s": row["time_s"] * (1.0 if row["actors"] == 1 else 1.3)} for row in rows],
        cores=2,
    )
    assert (
        found[5].holds == "cannot"
        and "with 1 of them 1.30 of the 2 cores are in use already" in found[5].why
    )


def test_a_gap_that_more_writers_cannot_close_for_want_of_cores_contradicts_nobody():
    rows = sweep(
        cores=2,
        actors=(1, 2, 4, 8),
        libraries={"opencv": Library(cpu_s=0.004, encode_s=0.0035, waits_s=0.007)},
    )
    found = judged(rows, cores=2, store_ms=7)
    assert (
        found[11].holds == "cannot"
        and "storing takes CPU too, and the 2 cores are full" in found[11].why
    )


def test_flat_because_the_cores_are_full_is_not_flat_because_of_the_writer():
    rows = sweep(cores=2, actors=(2, 4, 8))
    assert abs(slope(curve(rows, backend="opencv", writing="one"))) < 0.01
    assert verdicts(rows, cores=2)[7] == "cannot"


def test_a_writer_that_keeps_up_contradicts_the_talk():
    found = judged(sweep(cores=64, libraries={"opencv": FAST_STORE, "torchvision": FAST_STORE}))
    assert {found[claim].holds for claim in (7, 8, 9)} == {"no"}
    assert "up to 20 actors one writer keeps up" in found[7].measured
    assert found[11].holds == "cannot" and "no gap" in found[11].why


def test_time_that_does_not_fall_with_actors_contradicts_the_talk():
    rows = [row | {"time_s": 2.0} for row in sweep(cores=64)]
    found = verdicts(rows)
    assert (found[5], found[10]) == ("no", "no")


def test_one_backend_that_does_not_do_what_the_talk_says_is_enough():
    rows = [
        row | ({"time_s": 2.0} if row["backend"] == "torchvision" else {})
        for row in sweep(cores=64)
    ]
    assert verdicts(rows)[5] == "no"


def test_time_that_rises_with_one_writer_is_not_flat():
    rows = [
        row | ({"time_s": row["actors"]} if row["writers"] == 1 else {})
        for row in sweep(cores=64, libraries=SLOW_STORE)
    ]
    assert verdicts(rows)[7] == "no"


def test_a_writer_that_limits_while_nobody_is_held_up_is_not_the_talk_s_cause():
    rows = sweep(cores=64, libraries=SLOW_STORE)
    busy = [
        row | {"preprocess_busy_s": 0.9 * row["actors"] * row["time_s"] / row["images"]}
        for row in rows
    ]
    assert verdicts(busy)[9] == "no"
    starved = [row | {"preprocess_starved": 0.9} for row in rows]
    assert verdicts(starved)[9] == "no"


def with_cpu(rows: list[dict], percent) -> list[dict]:
    return [row | {"cpu_percent": percent(row)} for row in rows]


def test_cpu_of_both_libraries_is_the_same_with_one_thread_and_the_pool_makes_the_difference():
    one = with_cpu(sweep(cores=8), lambda row: min(12.5 * row["actors"], 100))
    assert judged(one, cores=8)[6].holds == "no"
    assert "--threads 1 8" in judged(one, cores=8)[6].why
    pool = [
        row
        | {
            "threads": 8,
            "cpu_percent": min(40 * row["actors"], 100)
            if row["backend"] == "opencv"
            else row["cpu_percent"],
        }
        for row in one
        if row["writers"] == 0
    ]
    found = judged(one + pool, cores=8)[6]
    assert (
        found.holds == "yes"
        and "With 8 threads an actor, which is OpenCV's thread pool, and not with one" in found.why
    )
    assert "1 thread an actor: OpenCV +0 points" in found.measured


def test_cpu_of_the_two_libraries_is_compared_where_cores_are_left_only():
    # Beyond the cores both are at 100%, which would say that they are alike.
    rows = with_cpu(
        sweep(cores=2), lambda row: 100 if row["actors"] > 2 or row["backend"] == "opencv" else 60
    )
    assert verdicts(rows, cores=2)[6] == "yes"


def test_cpu_with_one_writer_is_level_and_below_preprocessing_only():
    def percent(level):
        return lambda row: (
            level(row) if row["writers"] == 1 else 100 if row["actors"] > 4 else 25 * row["actors"]
        )

    rows = sweep(cores=64, libraries=SLOW_STORE)
    assert verdicts(with_cpu(rows, percent(lambda row: 80)))[8] == "yes"
    assert (
        verdicts(with_cpu(rows, percent(lambda row: 60 + row["actors"])))[8] == "no"
    )  # rises by 19
    assert (
        verdicts(with_cpu(rows, percent(lambda row: 95)))[8] == "no"
    )  # as much as without writing


def test_cpu_over_queues_and_its_nearness_to_preprocessing_only():
    def percent(row):
        if row["writers"] == 0:
            return 100
        return 95 if row["backend"] == "opencv" else 50 + 2 * row["actors"]

    rows = with_cpu(sweep(cores=8), percent)
    assert (verdicts(rows, cores=8)[12], verdicts(rows, cores=8)[13]) == ("yes", "yes")
    level = with_cpu(rows, lambda row: 70)
    assert verdicts(level, cores=8)[12] == "no"
    # One actor and one writer, of a thread each, cannot fill eight cores.
    few = with_cpu(rows, lambda row: 30 if row["actors"] == 1 else percent(row))
    assert verdicts(few, cores=8)[12] == "yes"
    assert judged(rows, cores=64)[12].holds == "cannot"
    assert verdicts(with_cpu(rows, lambda row: 100 if row["writers"] == 0 else 80))[13] == "no"


def test_three_ways_are_compared_at_ten_actors_or_the_nearest_that_all_have():
    assert three(sweep(cores=64), "opencv")["one"].count == 10
    assert three(sweep(cores=64, actors=(1, 2, 8, 16)), "opencv")["same"].count == 8
    assert three(sweep(cores=64, actors=(1,)), "opencv") == {}
    assert three(sweep(cores=64, writing=("none", "one")), "opencv") == {}


def test_the_cheaper_library_is_the_advice_for_any_number_of_cores():
    found = judged(sweep(cores=8), cores=8)[14]
    assert found.holds == "no" and "OpenCV is ahead with few and with many" in found.why
    assert "torchvision takes 2.00 times OpenCV's time with 1, 2.00 times with 20" in found.measured
    best = {
        (choice.cores, choice.backend): choice
        for choice in choices(sweep(cores=8), Where(cores=8), writing=True)
    }
    assert best[8, "opencv"].images_per_s == pytest.approx(8 / 0.003, rel=0.06)
    assert sum(best[8, "opencv"].counts.values()) >= 8
    other = {"opencv": TORCHVISION, "torchvision": OPENCV}
    assert (
        "torchvision is ahead with few and with many"
        in judged(sweep(cores=8, libraries=other), cores=8)[14].why
    )


def test_libraries_that_change_places_with_many_actors_are_as_the_talk_says():
    rows = [
        row
        | {
            "time_s": row["time_s"]
            * (4 if row["backend"] == "opencv" and row["actors"] >= 10 else 1)
        }
        for row in sweep(cores=64)
    ]
    assert verdicts(rows)[14] == "yes"
    assert verdicts(sweep(cores=64, actors=(4,)))[14] == "cannot"


def test_what_was_not_measured_is_said_to_be_that():
    found = judged(sweep(cores=64, writing=("none",)))
    assert found[7].holds == "cannot" and "--writers one" in found[7].why
    assert found[10].holds == "cannot" and "--writers same" in found[10].why
    alone = judged(sweep(cores=64, libraries={"opencv": OPENCV}))
    assert alone[5].holds == "cannot" and "torchvision was not measured: --backends" in alone[5].why
    assert alone[6].holds == alone[14].holds == "cannot"
    one = judged(sweep(cores=64, actors=(4,)))
    assert one[5].holds == "cannot" and "two numbers of actors" in one[5].why


def test_training_on_a_gpu_that_limits():
    found = judged(sweep(cores=16) + training(), cores=16, gpus=4)
    assert {found[claim].holds for claim in (17, 18, 19, 20)} == {"yes"}
    assert "slope +0.00" in found[17].measured
    (opencv, _) = gpus(training(), Where(cores=16, gpus=4))
    assert (opencv.now, opencv.training, opencv.preprocessing) == pytest.approx((50, 100, 50))
    assert opencv.ops is None
    # One actor measured, sixteen cores: preprocessing would keep a second GPU busy.
    (fast, _) = gpus(training(train_s=0.0015), Where(cores=16, gpus=4))
    assert fast.training == pytest.approx(2 * fast.now, rel=0.1)
    on_gpu = record(
        "opencv", OPENCV, cores=16, actors=1, kind="ops", workers=1, device="gpu", images_per_s=40.0
    )
    assert (
        "40 measured with the ops on the GPU"
        in judged([*training(), on_gpu], cores=16, gpus=4)[20].measured
    )


def test_training_that_waits_for_preprocessing_contradicts_the_talk():
    found = verdicts(training(train_s=0.0001, workers=(1, 2)), cores=16, gpus=2)
    assert {found[claim] for claim in (17, 18, 19, 20)} == {"no"}


def test_without_a_gpu_training_is_told_and_not_judged():
    found = judged(training(device="cpu"), cores=16)
    for claim in (17, 18, 19):
        assert found[claim].holds == "cannot" and "this machine has no GPU" in found[claim].why
        assert "on CPU instead" in found[claim].measured
    assert found[20].holds == "cannot"
    assert {verdicts(sweep(cores=16), cores=16)[claim] for claim in (17, 18, 19)} == {"cannot"}
    assert "--train" in judged(sweep(cores=16), cores=16, gpus=1)[17].why


def test_one_gpu_cannot_show_what_more_bring():
    found = judged(training(workers=(1,)), cores=16, gpus=1)
    assert found[17].holds == "yes"
    assert found[19].holds == "cannot" and "2 GPUs" in found[19].why


def test_when_preprocessing_once_has_paid():
    alone, trained = designs(sweep(cores=8) + training(cores=8, train_s=0.02), Where(cores=8))[:2]
    # An image: 2 ms of CPU an epoch, or 3 ms once and 0.4 an epoch: paid back after 1.9 epochs.
    assert (alone.backend, alone.trainer) == ("opencv", None)
    assert alone.cpu.break_even_epochs == pytest.approx(3 / 1.6) == alone.clock.break_even_epochs
    # A training of 50 images/s takes as long either way.
    assert trained.trainer == pytest.approx(50) and trained.clock.break_even_epochs is None
    assert judged(sweep(cores=8), cores=8)[21].holds == "yes"
    assert "by CPU time from 2 epochs on" in judged(sweep(cores=8), cores=8)[21].measured


def test_reading_back_that_costs_as_much_never_pays():
    same = {
        "opencv": Library(cpu_s=0.002, stored_s=0.002),
        "torchvision": Library(cpu_s=0.004, stored_s=0.004),
    }
    assert judged(sweep(cores=8, libraries=same), cores=8)[21].holds == "no"


def test_cpu_that_was_not_the_sweep_s_is_seen():
    rows = sweep(cores=8)
    assert others(rows, 8) == 0
    loud = [
        row | {"cpu_percent": 100.0, "time_s": 20.0} for row in sweep(cores=64, actors=(1, 2, 4))
    ]
    assert others(loud, 64) > 80
    assert others([], 8) == 0
    waiting = {
        "images_per_s": 70.0,
        "preprocess_cpu_s": 0.004,
        "write_cpu_s": 0.003,
    }  # one writer of a slow store
    assert (
        others([waiting | {"cpu_percent": 40.0}], 2) == 0
    )  # 0.49 cores are the stages', 0.31 Ray's
    assert others([waiting | {"cpu_percent": 100.0}], 2) > 50
    ends = {"actors": 20, "writers": 1, "time_s": 20.0}  # 21 actors, of 1.5 CPU seconds each
    assert others([waiting | ends | {"cpu_percent": 95.0}], 2) == 0


def test_nothing_measured_is_no_error():
    assert {finding.holds for finding in findings([], Where(cores=2))} == {"cannot"}
    empty = [
        dict.fromkeys(row)
        | {
            k: row[k]
            for k in ("kind", "backend", "actors", "writers", "workers", "device", "threads")
        }
        for row in sweep(cores=2)
    ]
    assert {finding.holds for finding in findings(empty, Where(cores=2))} == {"cannot"}


# --- cells that are too short -------------------------------------------------------------------


def with_fixed(rows: list[dict], seconds: float) -> list[dict]:
    return [row | {"fixed_s": seconds} for row in rows]


def test_cells_shorter_than_ten_times_their_fixed_cost_decide_no_claim():
    rows = sweep(cores=64)
    long = judged(with_fixed(rows, 0.001))
    assert {claim: finding.holds for claim, finding in long.items()} == verdicts(rows)
    short = judged(with_fixed(rows, 0.65))
    for claim in (5, 6, 10, 14):
        assert long[claim].holds != "cannot" and short[claim].holds == "cannot"
        assert short[claim].measured == long[claim].measured
        assert "--limit" in short[claim].why and long[claim].why in short[claim].why


def test_what_is_said_of_short_cells_names_a_limit_that_would_be_enough():
    rows = with_fixed(sweep(cores=64, actors=(1, 2)), 0.15)
    times = [row["time_s"] for row in rows]
    assert min(times) < 1.5 < max(times)
    short = [row for row in rows if row["time_s"] < 1.5]
    said = too_short(rows)
    assert said.startswith(f"{len(short)} of {len(rows)} cells decide no claim")
    limit = int(re.search(r"--limit (\d+)", said)[1])
    longer = [row | {"time_s": limit / row["images_per_s"]} for row in rows]
    assert too_short(longer) == ""
    shorter = [row | {"time_s": 0.85 * limit / row["images_per_s"]} for row in rows]
    assert too_short(shorter) != ""


def test_cells_that_are_long_enough_still_decide_beside_short_ones():
    rows = sweep(cores=64)
    mixed = [row | {"fixed_s": 0.06 if row["actors"] < 8 else 9.0} for row in rows]
    found = judged(mixed)
    assert found[5].holds == "yes" and "from 1 to 4" in found[5].measured


def test_rows_of_older_sweeps_which_have_no_fixed_cost_decide():
    assert too_short(sweep(cores=64)) == ""
