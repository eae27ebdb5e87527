"""Cut-outs on photos, made from cut-outs and photos that are made here."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from raypipe import UsageError
from raypipe.cli import main
from raypipe.data.cutouts import SIZE, load, paste, render
from raypipe.data.listing import list_images
from tests.conftest import files, photo


def cut_out(
    path: Path, colour: tuple[int, int, int], *, whole: bool = False, size: int = 90
) -> None:
    """A disc of one colour in a transparent PNG; or, if `whole`, an opaque square."""
    image = np.zeros((size, size + 30, 4), np.uint8)
    cv2.circle(image, (size // 2, size // 2), size // 3, (*colour[::-1], 255), cv2.FILLED)
    if whole:
        image[..., 3] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


@pytest.fixture
def material(tmp_path) -> Path:
    for index, (name, colour) in enumerate(
        {"reds": (250, 0, 0), "deep/blues": (0, 0, 250), "greens": (0, 250, 0)}.items()
    ):
        for number in range(4 - index):
            cut_out(tmp_path / "cut" / name / f"{number}.png", colour)
    cut_out(tmp_path / "cut/squares/a.png", (9, 9, 9), whole=True)
    (tmp_path / "cut/reds/broken.png").write_bytes(b"no image")
    (tmp_path / "photos").mkdir()
    for index in range(2):
        dim = (photo(index, height=400, width=700) * 0.3 + 60).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"photos/{index}.jpg"), dim)
    return tmp_path


def test_images_that_cannot_be_used_are_counted(material, caplog):
    (material / "photos/broken.jpg").write_bytes(b"no image")
    load(str(material / "cut"), str(material / "photos"), classes=3)
    assert "cut: 2 images are left out: they cannot be decoded, or are not partly" in caplog.text
    assert "photos: 1 images are left out: they cannot be decoded" in caplog.text


def test_boxes_are_around_what_was_pasted_and_labels_say_its_folder(material):
    made = load(str(material / "cut"), str(material / "photos"), classes=3)
    assert list(made.classes) == ["deep/blues", "greens", "reds"]
    assert len(made.cutouts) == 9 and len(made.photos) == 2
    colours = {1: 2, 2: 1, 3: 0}  # label -> its channel
    for index in range(30):
        picture, boxes, labels = render(made, 0, index)
        assert picture.shape == (*SIZE, 3) and 1 <= len(boxes) <= 4
        found = np.zeros(SIZE, bool)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            assert 0 <= x1 < x2 <= SIZE[1] and 0 <= y1 < y2 <= SIZE[0]
            bright = picture[y1:y2, x1:x2, colours[label]] > 180
            assert bright.mean() > 0.5  # a disc fills 0.79 of its box, less what lies on it
            found[y1:y2, x1:x2] = True
        assert not (picture.max(axis=2) > 200)[~found].any()  # nothing of it is outside
    for one in zip(render(made, 0, 5), render(made, 0, 5), strict=True):
        np.testing.assert_array_equal(*one)
    assert not np.array_equal(render(made, 0, 5)[0], render(made, 1, 5)[0])


def test_the_command_makes_an_input_with_boxes(material, capsys):
    arguments = [
        "cutouts",
        "--cutouts",
        str(material / "cut"),
        "--photos",
        str(material / "photos"),
        "--count",
        "7",
        "--classes",
        "2",
    ]
    assert main([*arguments, "--output", str(material / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "7 pictures, 7 cut-outs of 2 classes (deep/blues, reds) on 2 photos" in said
    table = list_images(
        str(material / "out/images"), annotations=str(material / "out/annotations.json")
    )
    assert table.num_rows == 7
    assert {label for labels in table["labels"].to_pylist() for label in labels} == {1, 2}
    coco = json.loads((material / "out/annotations.json").read_text())
    assert coco["categories"] == [{"id": 1, "name": "deep/blues"}, {"id": 2, "name": "reds"}]
    assert main([*arguments, "--output", str(material / "again")]) == 0
    assert files(material / "out") == files(material / "again")
    assert main([*arguments, "--output", str(material / "out")]) == 2
    assert "pictures would be mixed with earlier ones" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"classes": 4},
            r"3 folders .* have images with a transparent background \(deep/blues, greens, reds\)",
        ),
        ({"photos": "cut/none"}, "There is no photo"),
        ({"count": 0}, "--count is 0"),
    ],
)
def test_what_cannot_be_made_is_said(material, given, words):
    places = {
        "cutouts": str(material / "cut"),
        "photos": str(material / given.pop("photos", "photos")),
    }
    with pytest.raises(UsageError, match=words):
        paste(**places, output=str(material / "out"), **({"count": 3, "classes": 3} | given))


def test_images_that_are_there_are_never_overwritten(material, capsys):
    (material / "out/images").mkdir(parents=True)
    (material / "out/images/000000.jpg").write_bytes(b"the user's own")
    given = ["cutouts", "--cutouts", material / "cut", "--photos", material / "photos"]
    assert main([*map(str, given), "--output", str(material / "out"), "--classes", "1"]) == 2
    said = capsys.readouterr().err
    assert "out/images has files already, such as '000000.jpg'" in said
    assert (material / "out/images/000000.jpg").read_bytes() == b"the user's own"
