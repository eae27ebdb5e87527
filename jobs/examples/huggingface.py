"""Images preprocessed once, in the layout of Hugging Face's datasets, and read for training.

    python jobs/examples/huggingface.py

`datasets.load_dataset` shows the same files as images, with the names of their labels.
"""

import tempfile
from pathlib import Path

import cv2
import numpy as np

import raypipe


def main():
    with tempfile.TemporaryDirectory() as root:
        for number in range(40):  # photos/light/*.png and photos/dark/*.png
            kind = ("light", "dark")[number % 2]
            Path(root, "photos", kind).mkdir(parents=True, exist_ok=True)
            pixels = np.full((200, 300, 3), 180 if kind == "light" else 30, np.uint8)
            cv2.imwrite(f"{root}/photos/{kind}/{number}.png", pixels)
        raypipe.preprocess(
            f"{root}/photos",
            labels="folder",
            recipe="imagenet-224-val",
            format="huggingface",
            output=f"{root}/set",
        )
        with raypipe.loader(f"{root}/set", recipe="imagenet-224-val", finish="device") as loader:
            for batch in loader:
                brightness = batch.images.mean((1, 2, 3))
                light = [loader.classes[label] == "light" for label in batch.labels]
                print((brightness > 0).tolist() == light)


if __name__ == "__main__":
    main()
