import math

import numpy as np
import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

from raypipe import UsageError
from raypipe.models import detection
from raypipe.models.detection import MODELS, Classes, build

SIZES = dict.fromkeys(MODELS, (64, 96)) | {"ssd300_vgg16": (300, 300)}
LIGHT = ("ssd_tiny", "ssdlite320_mobilenet_v3_large")


def targets(*boxes, label=1):
    made = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": made, "labels": torch.full((len(made),), label)}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_images_as_the_recipe_left_them(name):
    with torch.device("meta"):  # weights cost seconds, and nothing depends on them here
        model = build(name, num_classes=4)
    height, width = SIZES[name]
    images = list(torch.randn(2, 3, height, width) * 100 + 7)  # no range that a model would expect
    for mode in (True, False):
        model.train(mode)
        batch, (target, _) = model.transform(images, [targets((8, 8, 40, 30)), targets()])
        # Neither resized nor normalised; at most padded.
        assert torch.equal(batch.tensors[:, :, :height, :width], torch.stack(images))
        assert batch.tensors.shape[2] - height < 64 and batch.tensors.shape[3] - width < 64
        assert batch.image_sizes == [(height, width)] * 2
        assert torch.equal(target["boxes"], torch.tensor([[8.0, 8, 40, 30]]))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in LIGHT else pytest.mark.slow) for name in MODELS]
)
def test_a_model_trains_and_finds_boxes_within_the_image(name):
    torch.manual_seed(0)
    height, width = SIZES[name]
    # Thousands of proposals take 20 s of CPU.
    few = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20}
    model = build(name, num_classes=4, arguments=few if name.startswith("faster") else {})
    images = list(torch.randn(2, 3, height, width))
    truths = [targets((8, 8, 40, 30), (20, 10, 60, 50), label=3), targets()]
    for amp in (False, True) if name in LIGHT else (False,):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            total = detection.total(model(images, truths))
        total.backward()
        assert math.isfinite(total.item())
        assert total.dtype == torch.float32
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    model.eval()
    with torch.no_grad():
        (result,) = model(images[:1])
    assert result["boxes"].shape[1] == 4
    assert (
        (result["boxes"] >= 0) & (result["boxes"] <= torch.tensor([width, height, width, height]))
    ).all()
    assert ((result["labels"] >= 1) & (result["labels"] <= 3)).all()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in LIGHT else pytest.mark.slow) for name in MODELS]
)
def test_boxes_and_scores_are_float32_where_the_model_computes_in_bfloat16(name):
    torch.manual_seed(0)
    # 1000 proposals in bfloat16 take a CPU without it 20 s.
    few = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20}
    arguments = few if name.startswith("faster") else {"score_thresh": 0.0}
    model = build(name, num_classes=91, arguments=arguments).eval()
    image = torch.randn(3, *SIZES[name])
    seen = []
    for module in model.modules():
        if isinstance(module, (AnchorGenerator, DefaultBoxGenerator)):
            module.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        model([image])
        with torch.autocast("cpu", torch.bfloat16):
            found = model([image])[0]
    assert torch.equal(seen[0][0], seen[1][0]) and seen[1][0].dtype == torch.float32
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_images_of_different_sizes_are_padded_with_zeros_and_keep_their_memory_layout():
    images = [torch.ones(3, 40, 50), torch.ones(3, 33, 64)]
    batch = detection.AsGiven(32)(images)[0].tensors
    assert batch.shape == (2, 3, 64, 64)
    assert batch.sum() == 3 * (40 * 50 + 33 * 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_categories_with_gaps_become_classes_without_and_back():
    classes = Classes.among([np.array([90, 3]), np.array([], np.int64), np.array([3, 17])])
    assert classes.ids == (3, 17, 90)
    assert classes.of(np.array([90, 3, 17, 3])).tolist() == [3, 1, 2, 1]
    assert classes.ids_of(np.array([3, 1, 2])).tolist() == [90, 3, 17]
    assert classes.of(np.array([], np.int64)).tolist() == []
    for unknown in (4, 91, 0):
        with pytest.raises(UsageError, match=f"category {unknown} is none of the 3 .*3, 17, 90"):
            classes.of(np.array([3, unknown]))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("ssd300_vgg", None, "did you mean 'ssd300_vgg16'"),
        ("ssd300_vgg16", (320, 320), "exactly 300x300, but the recipe makes 320x320"),
        ("ssdlite320_mobilenet_v3_large", None, "needs images of one size"),
        ("no.such.module:make", (64, 64), "cannot be imported"),
        ("raypipe.models.detection:MODELS", (64, 64), "is a dict; give a function"),
    ],
)
def test_a_model_that_cannot_be_is_refused(name, size, words):
    with pytest.raises(UsageError, match=words):
        detection.check(name, size)


def test_an_own_model_is_called_with_its_arguments_and_wrong_ones_are_refused():
    own = build(
        "raypipe.models.detection:ssd_tiny", num_classes=3, arguments={"detections_per_img": 7}
    )
    assert own.detections_per_img == 7
    assert isinstance(own.transform, detection.AsGiven)
    with pytest.raises(UsageError, match=r"does not take the arguments \{'widht': 3\}"):
        build("raypipe.models.detection:ssd_tiny", num_classes=3, arguments={"widht": 3})
    with pytest.raises(UsageError, match="returns a Classes"):
        build("tests.models.test_detection:no_module", num_classes=3)


def no_module(num_classes: int) -> Classes:
    return Classes((num_classes,))
