"""A trainer of your own: data, a model and a config, all in one module."""
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from learner import DataLoaders, Learner, Metrics, MulticlassAccuracy, PiecewiseSchedule
from learner.runs.config import Callbacks, Model, Optimiser, register_config, register_model


def spirals(examples, arms, noise, seed):
    """Points in the plane, and the number of the spiral arm that each lies on."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(examples) % arms
    radius = torch.rand(examples, generator=random).sqrt()
    angle = 2 * math.pi * (labels / arms + radius) + noise * torch.randn(examples, generator=random)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), labels


@register_model
class Perceptron(nn.Module):
    """Layers of one width, each with a ReLU."""

    def __init__(self, width: int = 32, depth: int = 2, classes: int = 3):
        """Make the layers.

        Args:
            width: features in each layer.
            depth: layers before the last.
            classes: how many there are to tell apart.
        """
        super().__init__()
        widths = [2, *[width] * depth]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    def forward(self, points): return self.layers(points)


@register_config(model="Perceptron", optimiser="AdamW", learning_rate=0.01, epochs=20)
def spiral_arms(
    model: Model,
    optimiser: Optimiser,
    callbacks: Callbacks = (),
    lr_schedule: list[tuple[int, float]] | None = None,  # [[15, 0.01], [20, 0.001]] is 0.01 before epoch 15, then 0.001
    batch_size: int = 64,  # examples
    noise: float = 0.2,  # standard deviation of the angle
    seed: int = 0,  # decides the initial weights, the points and their order
    splits: tuple[str, ...] = ("train", "validation"),  # what is needed: a training makes no test data
):
    """Which arm of a spiral does a point lie on?"""
    sizes = {"train": 3000, "validation": 600, "test": 600}
    data = {name: spirals(sizes[name], 3, noise, seed + 1000 * i) for i, name in enumerate(sizes) if name in splits}
    loaders = DataLoaders.from_tensors(**data, batch_size=batch_size, seed=seed)
    steering = [PiecewiseSchedule(lr_schedule)] if lr_schedule else []
    return Learner(model, optimiser, F.cross_entropy, loaders, [Metrics(accuracy=MulticlassAccuracy()), *steering, *callbacks])
