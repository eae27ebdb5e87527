"""Lightning's Trainer, whose own checkpoints hold the loader's state.

    python jobs/examples/lightning_trainer.py
trains for 7 steps, and goes on from the checkpoint with the very next row.
"""

import tempfile

import lightning
import torch

import raypipe


class Model(lightning.LightningModule):
    def __init__(self, seen):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3, 1), seen

    def training_step(self, batch):
        self.seen.extend((batch.epoch, image_id) for image_id in batch.image_ids)
        return self.layer(batch.images.float().mean((1, 2)) / 255).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def main():
    seen: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        keep = [lightning.pytorch.callbacks.ModelCheckpoint(folder, "kept", every_n_train_steps=7)]
        for steps, path in ((7, None), (-1, f"{folder}/kept.ckpt")):
            with raypipe.loader("demo:80", recipe="coco-300", batch_size=8, epochs=2) as loader:
                run = lightning.Trainer(max_epochs=2, max_steps=steps, callbacks=keep, logger=False)
                run.fit(Model(seen), loader, ckpt_path=path)
    print(f"{len(seen)} images, {len(set(seen))} different")


main()
