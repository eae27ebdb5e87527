"""Two workers of Ray Train.

    python jobs/examples/ray_train.py

starts a Ray; with RAY_ADDRESS it joins one.
"""

import os
import tempfile

import ray.train
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

import raypipe


def train(config):
    model = prepare_model(torch.nn.Linear(3, 1))
    with raypipe.loader("demo:90", recipe="coco-300", batch_size=8, actors=1, epochs=2) as loader:
        for epoch in range(loader.epoch, 2):
            for batch in loader:
                model(batch.images.float().mean((1, 2)) / 255).square().mean().backward()
            with tempfile.TemporaryDirectory() as kept:
                torch.save({"data": loader.state_dict()}, f"{kept}/state.pt")
                ray.train.report({"epoch": epoch}, checkpoint=Checkpoint.from_directory(kept))


def main():
    if "RAY_ADDRESS" not in os.environ:
        ray.init(num_cpus=4, log_to_driver=False)  # two for the workers, the rest for actors
    with tempfile.TemporaryDirectory() as folder:
        two, where = ScalingConfig(num_workers=2), RunConfig(storage_path=folder)
        print(TorchTrainer(train, scaling_config=two, run_config=where).fit().metrics)


if __name__ == "__main__":
    main()
