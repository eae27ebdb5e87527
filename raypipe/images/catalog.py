"""Recipes by name: MLPerf's image preprocessing, torchvision's detection presets, large photos.

Each description names the source of its parameters. `get` also reads own recipes from JSON files.
"""

from dataclasses import replace
from typing import Literal

from raypipe.errors import UsageError, did_you_mean
from raypipe.images.header import MAX_PIXELS
from raypipe.images.ops.augment import ColorJitter, HorizontalFlip, PhotometricDistort
from raypipe.images.ops.boxes import SanitizeBoxes
from raypipe.images.ops.geometry import CenterCrop, Resize, ShortSide
from raypipe.images.ops.op import Op
from raypipe.images.ops.random_geometry import (
    IoUCrop,
    LargeScaleJitter,
    MultiScale,
    RandomResizedCrop,
    ZoomOut,
)
from raypipe.images.recipe import Finish, Recipe
from raypipe.images.recipe_json import from_json

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_UNIT = Finish(scale=1 / 255)
_IMAGENET = Finish(scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
# Caffe's: no scale, BGR. The network's feature pyramid halves five times, so batches are padded to
# a multiple of 32.
_CAFFE = Finish(mean=(102.9801, 115.9465, 122.7717), channels="bgr", pad_multiple=32)

_INFERENCE = (
    "MLPerf inference, vision/classification_and_detection/python/dataset.py "
    "(2020-11, unchanged 2026-08)"
)
_SSD = "MLPerf training, single_stage_detector/ssd/{utils,train}.py (2020-11)"
_MASK = "MLPerf training, object_detection/pytorch/maskrcnn_benchmark (2020-11)"
_RETINANET = "MLPerf training, retinanet/ssd/{presets,model/transform}.py (retired by 2026-07)"
_TORCHVISION = (
    "Boxes around crowds are left out. torchvision 0.29.2, references/detection/presets.py"
)


def _stretch(size: int, *, antialias: bool = False) -> Resize:
    return Resize(height=size, width=size, antialias=antialias)


def _inference(size: int, *, rounding: Literal["nearest", "down"] = "nearest") -> Resize:
    """MLPerf's `maybe_resize`, which computes in float32."""
    return Resize(height=size, width=size, arithmetic="float", rounding=rounding)


def _classify(
    *, area: bool = False, antialias: bool = False, rounding: Literal["nearest", "down"] = "down"
) -> tuple[Op, ...]:
    """Short side to 256, then the middle 224x224: 87.5% of the short side."""
    short = ShortSide(short=256, long=MAX_PIXELS, antialias=antialias, area=area)
    return (short, CenterCrop(height=224, width=224, rounding=rounding))


# Measured by the tests on six generated images and sizes: OpenCV against MLPerf's float32.
_HALF = "within half a count of MLPerf's float pixels (torchvision: 1)"

_COCO_1200 = Recipe(
    name="coco-1200",
    description=f"SSD-ResNet34 inference: 1200x1200, ImageNet normalised, channels last; {_HALF}. "
    f"{_INFERENCE}",
    ops=(_inference(1200),),
    finish=replace(_IMAGENET, layout="hwc"),
)

_OPENIMAGES = {
    size: Recipe(
        name=f"openimages-{size}",
        description=f"RetinaNet inference: {size}x{size}, 0 to 1 (the model normalises); {_HALF}. "
        f"{_INFERENCE}",
        ops=(_inference(size),),
        finish=_UNIT,
    )
    for size in (300, 800, 1200)
}

_IMAGENETS = (
    Recipe(
        name="imagenet",
        description="ResNet-50 inference: short side 256 (INTER_AREA), middle 224x224, RGB less "
        f"its mean, channels last. {_INFERENCE}",
        ops=_classify(area=True),
        finish=Finish(mean=(123.68, 116.78, 103.94), layout="hwc"),
    ),
    Recipe(
        name="imagenet-mobilenet",
        description="MobileNet inference: short side 256, middle 224x224, -1 to 1, channels "
        f"last. {_INFERENCE}",
        ops=_classify(),
        finish=Finish(scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), layout="hwc"),
    ),
    Recipe(
        name="imagenet-pytorch",
        description="ResNet-50 inference in PyTorch: short side 256 (antialiased, Pillow), "
        f"middle 224x224, ImageNet normalised. {_INFERENCE}",
        ops=_classify(antialias=True, rounding="nearest"),
        finish=_IMAGENET,
    ),
    Recipe(
        name="imagenet-tflite-tpu",
        description="ResNet-50 inference in TFLite: short side 256, middle 224x224, BGR less its "
        f"mean, channels last. {_INFERENCE}",
        ops=_classify(),
        finish=Finish(mean=(103.939, 116.779, 123.68), channels="bgr", layout="hwc"),
    ),
)

_IMAGENET_224 = (
    Recipe(
        name="imagenet-224-train",
        description="Training of ImageNet classifiers: random resized crop to 224x224 "
        "(antialiased), flip, ImageNet normalised. torchvision 0.29.2, "
        "references/classification/presets.py",
        ops=(RandomResizedCrop(), HorizontalFlip()),
        finish=_IMAGENET,
    ),
    Recipe(
        name="imagenet-224-val",
        description="Evaluation of ImageNet classifiers: short side 256 (antialiased), middle "
        "224x224, ImageNet normalised. torchvision 0.29.2, references/classification/presets.py",
        ops=_classify(antialias=True, rounding="nearest"),
        finish=_IMAGENET,
    ),
)

_SSD_TRAIN = Recipe(
    name="ssd-300-train",
    description="SSD-ResNet34 training: IoU crop, flip, 300x300, colour jitter, ImageNet "
    "normalised. A training learns from boxes around crowds as from others, as MLPerf's does; "
    f"ssd-300-train-no-crowds leaves them out. {_SSD}",
    ops=(
        IoUCrop(flavour="mlperf"),
        HorizontalFlip(),
        _stretch(300, antialias=True),
        ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05),
    ),
    finish=_IMAGENET,
    needs_boxes=True,
)

_ALL = (
    *_IMAGENETS,
    *_IMAGENET_224,
    Recipe(
        name="coco-300",
        description="SSD-MobileNet inference: 300x300, uint8, channels last. With OpenCV equal "
        "to MLPerf's to the bit; with torchvision up to 4.2% of the values are 1 off. "
        f"{_INFERENCE}",
        ops=(_inference(300, rounding="down"),),
    ),
    Recipe(
        name="coco-300-pt",
        description=f"SSD-MobileNet inference in PyTorch: 300x300, -1 to 1; {_HALF}. {_INFERENCE}",
        ops=(_inference(300),),
        finish=Finish(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
    ),
    _COCO_1200,
    *(
        replace(
            _COCO_1200,
            name=f"coco-1200-{kind}",
            description=f"coco-1200 with channels first, as MLPerf runs it in {runtime}; "
            f"{_HALF}.{more} {_INFERENCE}",
            finish=_IMAGENET,
        )
        for kind, runtime, more in (
            ("onnx", "ONNX Runtime", ""),
            (
                "pt",
                "PyTorch",
                " Images without annotations stay, where MLPerf leaves them out (48 of val2017).",
            ),
            ("tf", "TensorFlow", ""),
        )
    ),
    *_OPENIMAGES.values(),
    _SSD_TRAIN,
    replace(
        _SSD_TRAIN,
        name="ssd-300-train-no-crowds",
        description="ssd-300-train without boxes around crowds, and without images that have no "
        f"others. {_SSD}",
        drops_crowds=True,
    ),
    Recipe(
        name="ssd-300-val",
        description=f"SSD-ResNet34 validation: 300x300, ImageNet normalised. {_SSD}",
        ops=(_stretch(300, antialias=True),),
        finish=_IMAGENET,
    ),
    Recipe(
        name="mask-rcnn-train",
        description="Mask R-CNN training: short side 800, long at most 1333, flip; BGR less its "
        "mean, padded to 32. MLPerf's boxes have inclusive corners (x2 - 1): it drops boxes of a "
        "pixel or less, raypipe those of less than a pixel. Images with crowds only are left "
        f"out; MLPerf learns from them as empty. {_MASK}",
        ops=(ShortSide(short=800, long=1333), HorizontalFlip(), SanitizeBoxes(min_size=1)),
        finish=_CAFFE,
        needs_boxes=True,
        drops_crowds=True,
    ),
    Recipe(
        name="mask-rcnn-val",
        description="Mask R-CNN evaluation: short side 800, long at most 1333; BGR less its "
        f"mean, padded to 32. {_MASK}",
        ops=(ShortSide(short=800, long=1333),),
        finish=_CAFFE,
    ),
    Recipe(
        name="retinanet-train",
        description="RetinaNet training: flip, 800x800, ImageNet normalised (after the resize, "
        "in uint8; MLPerf: before it, in float). Boxes around crowds are left out, as in MLPerf. "
        f"{_RETINANET}",
        ops=(HorizontalFlip(), _stretch(800)),
        finish=_IMAGENET,
        needs_boxes=True,
        drops_crowds=True,
    ),
    Recipe(
        name="retinanet-val",
        description=f"RetinaNet evaluation: 800x800, ImageNet normalised. {_RETINANET}",
        ops=(_stretch(800),),
        finish=_IMAGENET,
    ),
    Recipe(
        name="torchvision-hflip",
        description=f"Flip only, sizes as they are; 0 to 1. {_TORCHVISION}",
        ops=(HorizontalFlip(), SanitizeBoxes()),
        finish=_UNIT,
        drops_crowds=True,
    ),
    Recipe(
        name="torchvision-lsj",
        description="Large-scale jitter: 0.1 to 2 times, cut or padded to 1024x1024; 0 to 1. "
        f"{_TORCHVISION}",
        ops=(LargeScaleJitter(), HorizontalFlip(), SanitizeBoxes()),
        finish=_UNIT,
        drops_crowds=True,
    ),
    Recipe(
        name="torchvision-multiscale",
        description=f"Flip, short side 480 to 800, long at most 1333; 0 to 1. {_TORCHVISION}",
        ops=(
            HorizontalFlip(),
            MultiScale(sizes=tuple(range(480, 801, 32)), long=1333),
            SanitizeBoxes(),
        ),
        finish=_UNIT,
        drops_crowds=True,
    ),
    Recipe(
        name="torchvision-ssd",
        description="Colour distortion, zoom out, IoU crop, flip; sizes as they come; 0 to 1. "
        f"{_TORCHVISION}",
        ops=(PhotometricDistort(), ZoomOut(), IoUCrop(), HorizontalFlip(), SanitizeBoxes()),
        finish=_UNIT,
        drops_crowds=True,
    ),
    Recipe(
        name="torchvision-ssdlite",
        description=f"IoU crop, flip; sizes as they come; 0 to 1. {_TORCHVISION}",
        ops=(IoUCrop(), HorizontalFlip(), SanitizeBoxes()),
        finish=_UNIT,
        drops_crowds=True,
    ),
    # Measured on 14 JPEG photos of 12 to 18 megapixels, one thread, against decoding whole and
    # resizing antialiased (111 ms). Mean error in counts, PSNR in dB (all photos, the worst one):
    #   decoded at 1/8 scale        52 ms, 0.6 (49, 39)
    #   decoded at 1/4 scale        59 ms, 0.2 (55, 50)
    #   whole, INTER_AREA          115 ms, 0.7 (47, 38)
    #   whole, INTER_LINEAR         75 ms, 3.2 (37, 22), MLPerf's way
    Recipe(
        name="photos-300",
        description="Large photos to 300x300, antialiased, JPEGs decoded at a reduced scale: "
        "fast, and not meant to equal MLPerf's pixels",
        ops=(_stretch(300, antialias=True),),
        reduced_decode=True,
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def get(name: str) -> Recipe:
    """The recipe of that name, or from a JSON file.

    Args:
        name: of a recipe, or a path that ends in .json.

    Raises:
        UsageError: no recipe has that name, or the file holds none.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.lower().endswith(".json"):
        return from_json(name)
    raise UsageError(
        f"unknown recipe {name!r}{did_you_mean(name, RECIPES)}; or give the path of a .json file "
        "with a recipe"
    )
