"""Detection models by name, fed with what a recipe made: a model neither resizes nor normalises.

All keep torchvision's contract:

- Training: `model(images, targets)` returns a dict of losses, scalars.
- Evaluating: `model(images)` returns a list of {boxes, labels, scores}.
- images: a list of float tensors (3, height, width).
- targets: a list of {boxes: float32 (n, 4), labels: int64 (n,)}.
- Boxes are x1 y1 x2 y2 in pixels of the image as the recipe left it.
- Labels are classes from 1 on; 0 is background.

No model has pretrained weights. So nothing is downloaded, and a recipe may have any finish.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from raypipe.errors import UsageError, did_you_mean
from raypipe.images.ops.op import Size
from raypipe.images.own import imported
from raypipe.images.recipe import Finish, Recipe


@dataclass(frozen=True, slots=True)
class Classes:
    """A data set's category ids, which may have gaps (COCO's do), and the model's classes 1..K."""

    ids: tuple[int, ...]
    """Ascending; ids[i] is class i + 1."""

    @classmethod
    def among(cls, labels: Iterable[np.ndarray]) -> "Classes":
        """The classes that occur in `labels`, one (n,) int64 array per image."""
        arrays = list(labels)
        return cls(tuple(np.unique(np.concatenate(arrays)).tolist()) if arrays else ())

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Map category ids (n,) to classes, (n,) int64 from 1.

        Raises:
            UsageError: an id is none of these.
        """
        ids = np.asarray(self.ids, np.int64)
        at = np.searchsorted(ids, labels)
        known = at < len(ids)
        known[known] = ids[at[known]] == labels[known]
        if not known.all():
            raise UsageError(
                f"category {labels[~known][0]} is none of the {len(ids)} that the model knows "
                f"({_some(self.ids)}), so it cannot be trained on. Leave its boxes out, or train a "
                f"new model in another --storage."
            )
        return at.astype(np.int64) + 1

    def ids_of(self, classes: np.ndarray) -> np.ndarray:
        """Map classes (n,) from 1 back to category ids, (n,) int64."""
        return np.asarray(self.ids, np.int64)[np.asarray(classes) - 1]


def _some(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


class AsGiven(GeneralizedRCNNTransform):
    """torchvision's transform without resize, mean and std, which the recipe has done.

    Batches are padded as before. Results need no mapping back, because no image changes its size.
    """

    def __init__(self, size_divisible: int) -> None:
        super().__init__(
            min_size=1, max_size=1, image_mean=[], image_std=[], size_divisible=size_divisible
        )

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad to one tensor (n, 3, height, width), channels last in memory as GPUs want it."""
        height, width = (
            math.ceil(max(image.shape[side] for image in images) / size_divisible) * size_divisible
            for side in (1, 2)
        )
        batch = images[0].new_zeros((len(images), height, width, 3)).permute(0, 3, 1, 2)
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch


class _Tiny(nn.Module):
    """Seven 3x3 convolutions with strides to 8, 16, 32 and 64; four feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(3, 16), _conv(16, 32), _conv(32, 64), _conv(64, 64, stride=1)
        )
        self.deeper = nn.ModuleList([_conv(64, 96), _conv(96, 128), _conv(128, 128)])
        self.out_channels = [64, 96, 128, 128]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [self.stem(images)]
        for layer in self.deeper:
            maps.append(layer(maps[-1]))
        return OrderedDict((str(level), features) for level, features in enumerate(maps))


def _conv(before: int, after: int, stride: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


def ssd_tiny(
    *,
    num_classes: int,
    score_thresh: float = 0.01,
    nms_thresh: float = 0.45,
    detections_per_img: int = 200,
) -> SSD:
    """An SSD with 0.5 million parameters, for trials and tests on a CPU. Images from 64x64 on."""
    # Scales are shares of the image's side: objects from 5% of it on.
    anchors = DefaultBoxGenerator([[2], [2], [2], [2]], scales=[0.08, 0.16, 0.32, 0.5, 0.75])
    return SSD(
        _Tiny(),
        anchors,
        (0, 0),  # the transform's, which `build` replaces
        num_classes,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
    )


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def make(*, num_classes: int, **arguments: Any) -> nn.Module:
        return getattr(detection, name)(
            weights=None, weights_backbone=None, num_classes=num_classes, **arguments
        )

    return make


MODELS: dict[str, Callable[..., nn.Module]] = {
    "ssd_tiny": ssd_tiny,
    **{
        name: _torchvision(name)
        for name in (
            "ssd300_vgg16",
            "ssdlite320_mobilenet_v3_large",
            "retinanet_resnet50_fpn_v2",
            "fasterrcnn_resnet50_fpn_v2",
        )
    },
}
"""The models by name. Each takes num_classes (background included) and arguments of its own."""

_ONE_SIZE = ("ssd_tiny", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
"""SSDs lay their anchors out by the size of the batch, so its images must have one size."""


def check(name: str, size: Size | None) -> None:
    """Check that the model takes the images that the recipe makes.

    Args:
        size: (height, width) of all images after the recipe; None: it varies.

    Raises:
        UsageError: no such model, or it cannot take images of that size.
    """
    maker(name)
    if name == "ssd300_vgg16" and size != (300, 300):
        given = "different sizes" if size is None else "{}x{}".format(*size)
        raise UsageError(
            f"--model ssd300_vgg16 has layers for images of exactly 300x300, but the recipe makes "
            f"{given}. Choose a recipe that ends in 300x300, such as ssd-300-train, or another "
            f"model."
        )
    if name in _ONE_SIZE and size is None:
        raise UsageError(
            f"--model {name} needs images of one size, but the recipe leaves them in different "
            f"sizes. Add a Resize to the recipe, or choose retinanet_resnet50_fpn_v2 or "
            f"fasterrcnn_resnet50_fpn_v2."
        )


def maker(name: str, *, trusted: Collection[str] | None = None) -> Callable[..., nn.Module]:
    """Find the function that makes the model: one of MODELS, or the user's own `module:function`.

    Args:
        trusted: own functions that may be imported. None: any, because the user wrote `name`. A
            name out of a checkpoint was written by somebody else.

    Raises:
        UsageError: there is no such model or function, or it is not trusted.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise UsageError(
            f"unknown model {name!r}{did_you_mean(name, MODELS)}; write your own as module:function"
        )
    found = imported(name, what="own model" if trusted is None else "the model", trusted=trusted)
    if not callable(found):
        raise UsageError(
            f"own model {name!r} is a {type(found).__name__}; give a function that takes "
            f"num_classes and returns a module"
        )
    return found


def build(
    name: str,
    *,
    num_classes: int,
    arguments: Mapping[str, Any] | None = None,
    trusted: Collection[str] | None = None,
) -> nn.Module:
    """Make a model for images as the recipe leaves them, with random weights of torch's generator.

    Args:
        num_classes: background included.
        arguments: the model's own, such as trainable_backbone_layers or detections_per_img.
        trusted: as in `maker`.

    Raises:
        UsageError: no such model, it is not trusted, or it does not take these arguments.
    """
    make = maker(name, trusted=trusted)
    try:
        model = make(num_classes=num_classes, **(arguments or {}))
    except TypeError as error:
        raise UsageError(
            f"--model {name} does not take the arguments {dict(arguments or {})}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"own model {name!r} returns a {type(model).__name__}; it must return a torch.nn.Module"
        )
    transform = getattr(model, "transform", None)
    if isinstance(transform, GeneralizedRCNNTransform):
        model.transform = AsGiven(transform.size_divisible)
    _keep_boxes_exact(model)
    return model


def _keep_boxes_exact(model: nn.Module) -> None:
    """Keep boxes and scores in float32 where the model computes in bfloat16.

    torchvision makes anchors in the dtype of the feature maps, and boxes in that of the head's
    output. bfloat16 has 8 bits. Beyond 256 pixels, boxes would stand on every second pixel only.
    Non-maximum suppression separates classes by shifting each class's boxes away from the others'.
    It would merge boxes of one class that are up to 128 pixels apart (80 classes, 300x300 images).
    """
    for module in model.modules():
        if isinstance(module, (AnchorGenerator, DefaultBoxGenerator)):
            module.register_forward_pre_hook(_for_float32_anchors, with_kwargs=True)
        if isinstance(module, (SSD, RetinaNet, FCOS, RegionProposalNetwork)):
            module.head.register_forward_hook(_float32)
        if isinstance(module, RoIHeads):
            module.box_predictor.register_forward_hook(_float32)


def _for_float32_anchors(
    _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the feature maps by float32 ones of the same size and device that take no memory.

    Anchors take only the sizes, the device and the dtype from them.
    """

    def stand_in(maps: list[Tensor]) -> list[Tensor]:
        return [each.new_empty((), dtype=torch.float32).expand(each.shape) for each in maps]

    if "feature_maps" in named:
        return given, named | {"feature_maps": stand_in(named["feature_maps"])}
    return (given[0], stand_in(given[1]), *given[2:]), named


def _float32(_: nn.Module, given: object, out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.float()
    if type(out) in (list, tuple):
        return type(out)(_float32(_, given, each) for each in out)
    return (
        {name: _float32(_, given, each) for name, each in out.items()}
        if isinstance(out, dict)
        else out
    )


def finish_of(recipe: Recipe) -> Finish:
    """What turns the recipe's pixels into a model's input: its finish, by default values 0 to 1."""
    return recipe.finish or Finish(scale=1 / 255)


def parameters(model: nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The loss to minimise: the sum of what the model returned, a float32 scalar."""
    return torch.stack([loss.float() for loss in losses.values()]).sum()
