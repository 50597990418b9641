"""Train a small convolutional network on handwritten digits; leave pictures and the history in a folder."""
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from learner import Callback, Learner, Metrics, MulticlassAccuracy, Progress, digits, seed_everything, show_images


def network(classes=10, width=32):
    def conv(inputs, outputs, stride):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(conv(1, width, 1), conv(width, 2 * width, 2), conv(2 * width, 4 * width, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width, classes))


class KeepPredictions(Callback):
    "Keep images, labels and predicted classes of the first test batch, for a picture."
    def after_test_batch(self, batch_num, data, labels, predictions):
        if batch_num == 0: self.images, self.labels, self.predicted = data, labels, predictions.argmax(1)


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    kept = KeepPredictions()
    learn = Learner(network(), torch.optim.AdamW, F.cross_entropy, digits(batch_size=32),
                    [Metrics(accuracy=MulticlassAccuracy()), Progress(), kept])

    @learn.on("before_epoch")
    def slow_down(optimiser, epoch, num_epochs):
        for group in optimiser.param_groups: group["lr"] = 3e-3 * (1 - epoch / num_epochs)

    start = perf_counter()
    learn.train(12, learning_rate=3e-3)
    seconds = perf_counter() - start

    learn.history.to_csv(folder / "history.csv")
    learn.history.plot().figure.savefig(folder / "loss.png", dpi=120)
    pairs = list(zip(kept.predicted[:24].tolist(), kept.labels[:24].tolist(), strict=True))
    titles = [f"{guess}" if guess == label else f"{guess}, is {label}" for guess, label in pairs]
    colours = ["black" if guess == label else "crimson" for guess, label in pairs]
    show_images(kept.images[:24], titles, colours=colours).figure.savefig(folder / "predictions.png", dpi=120)
    accuracy = learn.history[-1]["test_accuracy"]
    print(f"\n{accuracy:.1%} of the test images are right, after {seconds:.1f} s of training.\n"
          f"{folder}: history.csv, loss.png, predictions.png")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/demo"])
