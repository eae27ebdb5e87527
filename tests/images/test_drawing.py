import numpy as np

from raypipe.images.drawing import draw_boxes


def test_boxes_are_drawn_where_they_are_on_a_copy_and_a_label_keeps_its_colour():
    image = np.full((200, 300, 3), 128, np.uint8)
    boxes = np.array(
        [[100.4, 80.2, 180.0, 150.0], [10, 2, 60, 50], [200, 100, 290, 190]], np.float32
    )
    drawn = draw_boxes(image, boxes, np.array([3, 90, 3]), ["red 0.97", "blue 0.50", "red 0.70"])
    assert (image == 128).all() and drawn.shape == image.shape
    changed = (drawn != 128).any(axis=2)
    for x1, y1, x2, y2 in np.round(boxes).astype(int).tolist():
        assert (
            changed[y1 : y2 + 1, x1].all()
            and changed[y2, x1 : x2 + 1].all()
            and changed[y1 : y2 + 1, min(x2, 299)].all()
        )
    assert not changed[120:140, 110:170].any()  # inside nothing is hidden
    assert (drawn[150, 100:180] == drawn[190, 200:280]).all() and (
        drawn[150, 150] != drawn[50, 50]
    ).any()


def test_nothing_found_is_drawn_as_the_image_itself_and_boxes_at_the_edge_do_no_harm():
    image = np.full((50, 40, 3), 7, np.uint8)
    assert (draw_boxes(image, np.zeros((0, 4), np.float32), np.zeros(0, int), []) == image).all()
    assert (
        draw_boxes(image, np.array([[0, 0, 40, 50]], np.float32), np.array([1]), ["whole"]).shape
        == image.shape
    )
