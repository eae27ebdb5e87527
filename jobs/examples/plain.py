"""A plain PyTorch loop, with a loader to train and one to judge.

    python jobs/examples/plain.py

A small ResNet learns what is in the boxes of generated photos: accuracy above 0.6 in three epochs.
"""

import torch
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import roi_align

import raypipe


def things(batch):
    """The parts of the images that are in boxes, 32x32, and their classes."""
    images = batch.images.permute(0, 3, 1, 2).float() / 255
    return roi_align(images, batch.boxes, 32), torch.cat(batch.labels) - 1


def main():
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=6)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    with (
        raypipe.loader("demo:200", recipe="coco-300", transform=things, epochs=3) as training,
        raypipe.loader("demo:60", recipe="coco-300", transform=things, seed=1) as judged,
    ):
        for pictures, classes in (batch for _ in range(3) for batch in training):
            optimizer.zero_grad()
            cross_entropy(model(pictures), classes).backward()
            optimizer.step()
        model.eval()
        right = [model(pictures).argmax(1) == classes for pictures, classes in judged]
    print(f"accuracy {torch.cat(right).float().mean():.2f}")


if __name__ == "__main__":
    main()
