"""Processes in step by DDP, each with its share of the batches of one execution.

    python jobs/examples/ddp.py

is one process; `torchrun --nproc-per-node 2 jobs/examples/ddp.py` are two.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import raypipe


def main():
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    linear = torch.nn.Linear(3, 1)
    model = DistributedDataParallel(linear) if dist.is_initialized() else linear
    optimizer, steps = torch.optim.SGD(model.parameters(), 0.1), 0
    # The same call on every rank. batch_size is of each of them.
    with raypipe.loader("demo:90", recipe="coco-300", batch_size=8, actors=1, epochs=2) as loader:
        for batch in (batch for _ in range(2) for batch in loader):
            things = torch.tensor([float(len(boxes)) for boxes in batch.boxes])
            optimizer.zero_grad()
            mse_loss(model(batch.images.float().mean((1, 2)) / 255)[:, 0], things).backward()
            optimizer.step()
            steps += 1
    state = loader.state_dict()  # any rank's: it says what all of them have got
    print(f"rank {os.environ.get('RANK', 0)}: {steps} steps, next epoch {state['epoch']}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
