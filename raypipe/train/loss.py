"""What a step minimises, and how: a model with its loss as one module, and the optimizer."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raypipe.models import detection
from raypipe.train.settings import Learning


class Loss(nn.Module):
    """The model and its loss as one module, so that DDP sees each step as one call.

    A call with no images is a step too.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        if not images:
            # Zero, but a function of every parameter: DDP needs a gradient for each of them. Batch
            # norms see nothing.
            trained = (each for each in self.model.parameters() if each.requires_grad)
            return torch.stack([parameter.sum() for parameter in trained]).sum() * 0.0
        with _settled_norms(self.model) if len(images) == 1 else contextlib.nullcontext():
            return detection.total(self.model(images, targets))


@contextlib.contextmanager
def _settled_norms(model: nn.Module) -> Iterator[None]:
    """Make batch norms use their running statistics.

    One image has no statistics where its feature map is 1x1: torch raises.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def optimizer_for(model: nn.Module, learning: Learning) -> torch.optim.Optimizer:
    """Make the optimizer over all parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr, decay = learning.lr, learning.weight_decay
    if learning.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
    return torch.optim.SGD(trained, lr=lr, momentum=learning.momentum, weight_decay=decay)
