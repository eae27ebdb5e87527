"""Both backends give the same result for each op, the finish and encoding."""

import numpy as np
import pytest
import torch

from raypipe import UsageError
from raypipe.images import BACKENDS, backend, opencv, torchvision
from raypipe.images.catalog import RECIPES
from raypipe.images.decode import read_header
from raypipe.images.memory import SCRATCH
from raypipe.images.ops.augment import AddNoise, Erase
from raypipe.images.ops.boxes import SanitizeBoxes
from raypipe.images.ops.colour import (
    CLAHE,
    AutoContrast,
    Brightness,
    Contrast,
    Equalize,
    Gamma,
    Greyscale,
    Hue,
    Permute,
    Saturation,
)
from raypipe.images.ops.filters import Bilateral, GaussianBlur, Median, NonLocalMeans, Sharpness
from raypipe.images.ops.geometry import Affine, Crop, Flip, Pad, Resize, affine_matrix
from raypipe.images.recipe import Finish, Recipe, check_backend
from tests.images.pixels import by_torchvision, difference, tensor

# How far results may differ, in counts of 255: measured, and explained by how the libraries round.
TOLERANCE = [
    *((Resize(height=h, width=w), 1) for h, w in ((300, 300), (801, 933), (30, 600))),
    *(
        (Resize(height=h, width=w, antialias=True), 1)
        for h, w in ((300, 300), (123, 77), (801, 933), (30, 600), (600, 30))
    ),
    (Crop(top=30, left=20, height=200, width=301), 0),
    (Flip(), 0),
    (Flip(axis="vertical"), 0),
    *(
        (Pad(top=9, left=30, bottom=2, fill=(123, 117, 104), mode=mode), 0)
        for mode in ("constant", "reflect", "symmetric", "edge")
    ),
    (
        Affine(
            matrix=affine_matrix((381, 507), angle=0.4, shear=0.1, scale=1.3, shift=(9, 4)),
            fill=(123, 117, 104),
        ),
        1,
    ),
    (Affine(matrix=(1.0, 0.0, 0.5, 0.0, 1.0, -20.25)), 1),
    *((Brightness(factor=factor), 0) for factor in (0, 0.3, 1, 1.9, 2)),
    *((Contrast(factor=factor), 0) for factor in (0, 0.5, 1, 1.5, 4)),
    *((Saturation(factor=factor), 1) for factor in (0, 0.5, 1, 1.5, 2)),
    *((Hue(shift=shift), 1) for shift in (-0.5, -0.05, 0, 0.05, 0.3)),
    (Permute(order=(1, 2, 0)), 0),
    (Greyscale(), 1),
    *(
        (Gamma(gamma=gamma, gain=gain), 0)
        for gamma, gain in ((0.4, 1), (1, 1), (2.2, 1), (1.2, 1.4), (0, 1))
    ),
    (Equalize(), 0),
    (AutoContrast(), 0),
    *((Sharpness(factor=factor), 1) for factor in (0, 0.5, 1, 2, 5)),
    *(
        (GaussianBlur(kernel=kernel, sigma=sigma), most)
        for kernel, sigma, most in ((3, 0.5, 1), (5, 1.1, 1), (9, 3.0, 1), (23, 5.0, 2))
    ),
    (AddNoise(sigma=9, seed=4), 0),
    (Erase(top=10, left=20, height=30, width=40, fill=(1, 2, 3)), 0),
]


@pytest.mark.parametrize(("op", "most"), TOLERANCE, ids=lambda value: str(value)[:60])
def test_backends_agree(op, most, picture):
    ours = opencv.apply(op, picture)
    assert ours.shape == (*op.output_size(picture.shape[:2]), 3)
    assert difference(ours, by_torchvision(op, picture)) <= most


@pytest.mark.parametrize("op", [op for op, _ in TOLERANCE], ids=lambda op: str(op)[:60])
def test_torchvision_does_images_of_one_size_together_and_on_the_device_where_they_are(
    op, picture, scene
):
    height, width = 240, 360
    images = torch.stack(
        [tensor(image[:height, :width]) for image in (picture, scene, picture[::-1])]
    )
    together = torchvision.apply(op, images)
    for image, result in zip(images, together, strict=True):
        torch.testing.assert_close(result, torchvision.apply(op, image), rtol=0, atol=0)
    # A device without arithmetic, which refuses to be mixed with another, as a GPU does.
    if not isinstance(op, Equalize | AutoContrast):  # these read values on the way
        elsewhere = torchvision.apply(op, images.to("meta"))
        assert (
            elsewhere.device.type == "meta"
            and elsewhere.shape == together.shape
            and elsewhere.dtype == torch.uint8
        )


OPENCV_ONLY = [CLAHE(), Median(), Bilateral(), NonLocalMeans(search=5)]


@pytest.mark.parametrize(
    "op", [*(op for op, _ in TOLERANCE), *OPENCV_ONLY], ids=lambda op: str(op)[:60]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_ops_leave_their_input_alone_and_their_result_in_place(op, name, scene):
    if name == "torchvision" and op in OPENCV_ONLY:
        return
    module = backend(name)
    image = scene[:, :400]  # not contiguous: what a crop leaves
    before = image.copy()
    shard = np.full((3, *op.output_size(image.shape[:2]), 3), 77, np.uint8)
    module.execute(image if module is opencv else tensor(image), (op,), shard[1])
    np.testing.assert_array_equal(image, before)
    assert (shard[0] == 77).all() and (shard[2] == 77).all()
    expected = opencv.apply(op, image) if module is opencv else by_torchvision(op, image)
    np.testing.assert_array_equal(shard[1], expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_ops_copy_the_image(name, scene):
    out = np.empty_like(scene)
    backend(name).execute(scene if name == "opencv" else tensor(scene), (), out)
    np.testing.assert_array_equal(out, scene)


FINISHES = {name: recipe.finish for name, recipe in RECIPES.items() if recipe.finish is not None}


FINISHES["bgr, rows last"] = Finish(
    channels="bgr", layout="hwc", mean=(1, 2, 3), std=(4, 5, 6), pad_multiple=7
)


@pytest.mark.parametrize("name", FINISHES)
def test_finish_is_the_formula_in_both_backends(name):
    finish = FINISHES[name]
    batch = np.random.default_rng(0).integers(0, 256, (3, 35, 64, 3), dtype=np.uint8)
    pixels = batch[..., ::-1] if finish.channels == "bgr" else batch
    expected = (pixels * np.float64(finish.scale) - finish.mean) / finish.std
    if finish.pad_multiple:
        height, width = (-(-side // finish.pad_multiple) * finish.pad_multiple for side in (35, 64))
        expected = np.pad(expected, ((0, 0), (0, height - 35), (0, width - 64), (0, 0)))
    if finish.layout == "chw":
        expected = expected.transpose(0, 3, 1, 2)
    ours = opencv.finish(batch, finish)
    theirs = torchvision.finish(torch.from_numpy(batch), finish)
    assert ours.dtype == np.float32 and theirs.dtype == torch.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        theirs.numpy(),
        expected,
        rtol=1e-6,
        atol=2e-5 if finish.scale == 1 and max(finish.std) == 1 else 1e-6,
    )


@pytest.mark.parametrize("layout", ["chw", "hwc"])
def test_finish_pads_images_of_different_sizes_with_zeros(layout):
    finish = Finish(
        scale=2, mean=(1, 2, 3), channels="bgr", layout=layout, pad_multiple=32, dtype="float16"
    )
    images = [
        np.full((33, 20, 3), (10, 20, 30), np.uint8),
        np.full((10, 65, 3), (10, 20, 30), np.uint8),
    ]
    expected = np.zeros((2, 64, 96, 3), np.float16)
    expected[0, :33, :20] = expected[1, :10, :65] = (59, 38, 17)
    if layout == "chw":
        expected = expected.transpose(0, 3, 1, 2)
    for result in (
        opencv.finish(images, finish),
        torchvision.finish([torch.from_numpy(image) for image in images], finish).numpy(),
    ):
        np.testing.assert_array_equal(result, expected)
        assert result.dtype == np.float16
    with pytest.raises(UsageError, match=r"differ in size.*set the finish's pad_multiple"):
        opencv.finish(images, Finish())


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_both_backends_write_the_same_jpeg(picture, quality):
    assert opencv.encode(picture, "jpeg", quality) == torchvision.encode(picture, "jpeg", quality)


def test_png_keeps_every_pixel(picture):
    for module in (opencv, torchvision):
        data = module.encode(picture, "png", 0)
        np.testing.assert_array_equal(opencv.decode(data, read_header(data)), picture)


@pytest.mark.parametrize("op", OPENCV_ONLY, ids=lambda op: type(op).__name__)
def test_torchvision_says_what_it_cannot_do_before_the_run(op):
    with pytest.raises(
        UsageError,
        match=rf"op 1 \({type(op).__name__}\): the torchvision backend .*--backend opencv",
    ):
        check_backend(Recipe(name="own", ops=(Flip(), op)), "torchvision")
    check_backend(Recipe(name="own", ops=(Flip(), op, SanitizeBoxes())), "opencv")


@pytest.mark.parametrize("name", BACKENDS)
def test_the_table_of_a_backends_ops_is_what_it_executes(name):
    module = backend(name)
    own = {kind for kind in module.apply.registry if kind.__module__.startswith("raypipe.")}
    assert own == SCRATCH[name].keys()
