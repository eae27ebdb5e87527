"""Mean average precision against cases worked out by hand."""

import numpy as np
import pytest

from raypipe.models.evaluate import Found, Truth, mean_average_precision

NONE = np.zeros((0, 4))


def truth(*boxes, labels=None, crowds=()) -> Truth:
    return Truth(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels if labels is not None else [1] * len(boxes), np.int64),
        crowds=np.array(crowds, bool),
    )


def found(*scored, labels=None) -> Found:
    return Found(
        boxes=np.array([box for box, _ in scored], np.float32).reshape(-1, 4),
        labels=np.array(labels if labels is not None else [1] * len(scored), np.int64),
        scores=np.array([score for _, score in scored], np.float32),
    )


A, B, FAR = (0, 0, 100, 100), (200, 0, 300, 100), (500, 500, 600, 600)


def test_all_found_exactly_is_one():
    result = mean_average_precision([truth(A, B)], [found((A, 0.9), (B, 0.8))])
    assert (result.map, result.map50, result.map75) == (1.0, 1.0, 1.0)
    assert result.by_label == {1: 1.0}


def test_an_overlap_counts_at_the_thresholds_that_it_reaches():
    # IoU 0.62: reaches .50, .55 and .60 of the ten thresholds.
    result = mean_average_precision([truth(A)], [found(((0, 0, 100, 62), 0.9))])
    assert result.map == pytest.approx(0.3)
    assert (result.map50, result.map75) == (1.0, 0.0)


def test_a_false_find_between_two_true_ones_costs_precision_at_the_second_half_of_recall():
    # By score: true (recall 1/2, precision 1), false, true (recall 1, precision 2/3).
    # Of 101 recalls, 51 are at most 1/2.
    result = mean_average_precision([truth(A, B)], [found((A, 0.9), (FAR, 0.8), (B, 0.7))])
    assert result.map == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_find_in_an_image_without_anything_counts_as_false():
    result = mean_average_precision([truth(A), truth()], [found((A, 0.8)), found((A, 0.9))])
    assert result.map == pytest.approx(0.5)


def test_a_second_find_of_the_same_thing_is_false_but_a_find_in_a_crowd_is_neither():
    twice = mean_average_precision([truth(A, B)], [found((A, 0.9), (A, 0.8), (B, 0.7))])
    assert twice.map == pytest.approx((51 + 50 * 2 / 3) / 101)
    crowd = (400, 0, 600, 200)
    inside = mean_average_precision(
        [truth(A, crowd, crowds=(False, True))],
        [found((A, 0.5), ((410, 10, 500, 100), 0.9), ((500, 90, 590, 190), 0.8))],
    )
    assert inside.map == 1.0


def test_the_mean_is_over_labels_that_there_are_and_other_labels_do_not_count():
    truths = [truth(A, B, labels=[3, 90])]
    result = mean_average_precision(
        truths, [found((A, 0.9), (FAR, 0.99), (B, 0.9), labels=[3, 7, 3])]
    )
    # 3: the second detection is false, but comes after all is found. 90: nothing was found.
    # 7: is in no truth.
    assert result.by_label == {3: 1.0, 90: 0.0}
    assert result.map == 0.5


def test_nothing_found_is_zero_and_nothing_to_find_is_unknown():
    assert mean_average_precision([truth(A)], [found()]).map == 0.0
    assert mean_average_precision([truth()], [found((A, 0.9))]) is None
    assert mean_average_precision([truth(A, crowds=(True,))], [found((A, 0.9))]) is None
    assert mean_average_precision([], []) is None
