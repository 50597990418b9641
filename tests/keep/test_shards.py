"""Shards over many batches: their random numbers, and what is not done in each batch."""
import random

import torch
from torch import nn

from learner import DataLoaders, Learner
from learner.keep.distributed import Distributed
from learner.keep.shards import draw_key, seed_shard
from learner.loop import resolution


def test_the_keys_of_a_long_training_never_come_again():
    torch.manual_seed(0)
    keys, numbers = set(), []
    for place in range(200_000):  # with 32 bits alone from one to the next, the 97,465th was one that had been there
        keys.add(key := draw_key(*divmod(place, 50_000)))
        seed_shard(key)
        numbers.append(key % 2**32)
    assert len(keys) == 200_000
    seen = {}  # a seed of 32 bits may come again, but what follows it is another
    again = [(seen[number], place) for place, number in enumerate(numbers) if seen.setdefault(number, place) != place]
    assert len(again) < 25 and all(numbers[one + 1] != numbers[other + 1] for one, other in again if other < 199_999)


def test_shards_of_a_batch_and_what_follows_it_have_numbers_of_their_own():
    def drawn(key, shard=None):
        seed_shard(key, shard)
        return torch.rand(()).item(), random.random()

    found = [drawn(7, shard) for shard in (None, *range(64))] + [drawn(8, shard) for shard in (None, *range(64))]
    assert all(len({*each}) == len(found) for each in zip(*found, strict=True))
    assert drawn(7, 3) == drawn(7, 3)


def test_callbacks_are_sorted_as_often_for_many_batches_as_for_few(monkeypatch):
    sort, sorted_for = resolution.in_order, []
    monkeypatch.setattr(resolution, "in_order", lambda callbacks: sorted_for.append(1) or sort(callbacks))

    def times(batches):
        sorted_for.clear()
        loader = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(batches)]
        Learner(nn.Linear(3, 1), torch.optim.SGD, nn.functional.mse_loss, DataLoaders(train=loader), Distributed(shards=2)).train(1)
        return len(sorted_for)

    assert times(3) == times(30)
