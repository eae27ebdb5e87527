"""An image size, boxes on it, and plans for it: shared by the tests of ops and recipes."""

import numpy as np

from raypipe.images.recipe import Recipe

SIZE = (480, 640)
BOXES = np.array([[10, 20, 110, 220], [300, 200, 639, 479], [600, 400, 640, 480]], np.float32)
INSIDE = np.array([[130, 100, 160, 220], [300, 200, 420, 311]], np.float32)


def recipe(*ops, **settings) -> Recipe:
    return Recipe(name="test", ops=ops, **settings)


def plan(*ops, seed=0, epoch=0, image_id="a", size=SIZE, boxes=BOXES):
    return recipe(*ops).plan(seed=seed, epoch=epoch, image_id=image_id, size=size, boxes=boxes)
