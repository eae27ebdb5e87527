"""Convert images between backends, and compare them."""

import numpy as np
import torch
from PIL import Image

from raypipe.images import torchvision


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_torchvision(op, image: np.ndarray) -> np.ndarray:
    return torchvision.apply(op, tensor(image)).permute(1, 2, 0).numpy()


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(int) - other).max())


def pillow_resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
