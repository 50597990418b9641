"""Weights in parts: what ranks with a part each train is what one process trains, and goes on on any number of them."""
import contextlib

import pytest
import torch
from processes import At, Counting, as_forks, ctrl_c, data, group, make, metrics, values
from torch import nn

from learner.base.store import load_state
from learner.keep.checkpoint import Checkpoint
from learner.keep.distributed import Distributed
from learner.keep.fingerprints import Fingerprints
from learner.loop.stages import Callback, CancelBatchException, CancelStepException
from learner.steer.accumulate import Accumulate
from learner.steer.multi import Optimisers
from learner.steer.update import EMA, ClipGradients

pytestmark = as_forks


def weights(learn):
    return torch.cat([parameter.detach().flatten() for parameter in learn.model.parameters()])


def is_plain(learn):
    "Whether nothing is left of parts: tensors of one kind, the optimiser's too, and a forward of the class."
    found = [*learn.model.parameters(), *learn.model.state_dict().values()]
    for entries in learn.optimiser.state.values(): found += entries.values()
    learn.model.load_state_dict(learn.model.state_dict())  # no hook of FSDP is left, which would fail
    return {type(each) for each in found} <= {torch.Tensor, nn.Parameter} and "forward" not in vars(learn.model)


class Sizes(Callback):
    "Counts the numbers of weights, gradients and moments that this process holds."
    watches = True

    def __init__(self): self.found = []

    def before_step(self, learn):
        parts = [*learn.model.parameters(), *(p.grad for p in learn.model.parameters())]
        for entries in learn.optimiser.state.values(): parts += [each for each in entries.values() if each.numel() > 1]
        self.found.append(sum(part.to_local().numel() for part in parts))


CASES = {"whole": {"shard": True}, "by layer": {"shard": nn.Linear}, "by two kinds": {"shard": (nn.Linear, nn.Tanh)}}


@pytest.mark.parametrize(("world", "case"), [(2, "whole"), (2, "by two kinds"), (4, "by layer")])
def test_ranks_with_parts_train_what_one_process_trains(tmp_path, world, case):
    def train(rank):
        own = Distributed(**CASES[case])
        learn, sizes = make(own, metrics(), ClipGradients(0.5), dropout=0, seed=0 if rank is None else 10 * rank), Sizes()
        before = [*learn.model.parameters()]
        for epochs in (2, 1): learn.train(epochs, learning_rate=0.01, callbacks=sizes if rank is not None else None)
        assert all(one is other for one, other in zip(before, learn.model.parameters(), strict=True)) and is_plain(learn)
        return learn.history.rows, weights(learn), learn.validate(), learn.fingerprint()["model"], sizes.found

    alone, found = train(None), values(world, train, tmp_path)
    for rows, end, validated, *_ in found:
        torch.testing.assert_close(end, alone[1], rtol=1e-4, atol=1e-6)
        for row, wanted in zip([*rows, validated], [*alone[0], alone[2]], strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
    assert len({each[3] for each in found}) == 1
    total = len(alone[1])
    assert sum(each[4][0] for each in found) == 2 * total  # weights and gradients before the first step,
    assert sum(each[4][-1] for each in found) == 4 * total  # and AdamW's two moments before the last


@pytest.mark.filterwarnings("ignore:the resumed training had callbacks:UserWarning")  # it does without, on purpose
def test_a_checkpoint_of_parts_is_one_of_a_plain_training_and_goes_on_on_any_number_of_ranks(tmp_path):
    straight = make(dropout=0)
    straight.train(2, learning_rate=0.01)

    def stop(rank):
        learn = make(Distributed(shard=True), Checkpoint(tmp_path / "run", steps=2), At("before_batch", ctrl_c, 1, 1, 3), dropout=0)
        with contextlib.suppress(KeyboardInterrupt): learn.train(2, learning_rate=0.01)
        place = tuple(learn.place)
        assert is_plain(learn)
        learn.train(resume=True)  # in the same processes
        return place, weights(learn)

    def go_on(rank):
        learn = make(*([] if rank is None else [Distributed(shard=nn.Linear)]), dropout=0, seed=5)
        learn.train(resume=tmp_path / "kept.safetensors")
        assert is_plain(learn)
        return weights(learn)

    for place, end in values(2, stop, tmp_path):
        assert place == (1, "train", 4)
        torch.testing.assert_close(end, weights(straight), rtol=1e-4, atol=1e-6)
    kept = next(path for path in sorted((tmp_path / "run").iterdir()) if path.name == "epoch-0001-batch-00004.safetensors")
    kept.rename(tmp_path / "kept.safetensors")
    state = load_state(tmp_path / "kept.safetensors")
    assert {name: value.shape for name, value in state["model"].items()} == {
        name: value.shape for name, value in straight.model.state_dict().items()}
    assert state["optimiser"]["state"][0]["exp_avg"].shape == straight.model[0].weight.shape
    for end in (go_on(None), *values(2, go_on, tmp_path), *values(4, go_on, tmp_path)):
        torch.testing.assert_close(end, weights(straight), rtol=1e-4, atol=1e-6)


def test_several_optimisers_ragged_batches_and_cancelled_ones(tmp_path):
    def both(learn):
        parts = {"first": learn.model[0], "last": learn.model[3]}
        learn.optimiser = Optimisers(**{name: torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for name, part in parts.items()})
        return learn

    def cancel(): raise CancelBatchException

    def train(rank):
        ends = []
        for sizes in ({"examples": 41}, {"examples": 3, "batch_size": 1}):  # one example left; fewer than ranks
            learn = both(make(Distributed(shard=True), At("after_loss", cancel, epoch=0, batch=1), dropout=0, **sizes))
            learn.train(2)
            ends.append(weights(learn))
        return ends

    alone = train(None)
    for found in values(2, train, tmp_path):
        for end, wanted in zip(found, alone, strict=True): torch.testing.assert_close(end, wanted, rtol=1e-4, atol=1e-6)


def test_a_training_within_an_exception_handler_is_one_that_does_not_fail(tmp_path):
    def train(rank):
        try: raise StopIteration
        except StopIteration:  # as of a training that is tried again with smaller batches
            learn = make(Distributed(shard=True), Checkpoint(tmp_path / f"of {rank}"), dropout=0)
            learn.train(1)
            return weights(learn)

    alone = train(None)
    for end in values(2, train, tmp_path): torch.testing.assert_close(end, alone, rtol=1e-4, atol=1e-6)


class LeavesOut(Callback):
    def before_step(self): raise CancelStepException


class Reads(Callback):
    writes = True

    def after_batch(self, learn): learn.model.state_dict()


REFUSED = {
    "batch norm": (lambda: with_layer(nn.BatchNorm1d(6)), "0.0 is a BatchNorm1d"),
    "a buffer": (lambda: with_layer(Counting()), "the buffer 0.0.seen"),
    "Accumulate": (lambda: make(Distributed(shard=True), Accumulate(2)), "Accumulate does not work with"),
    "EMA": (lambda: make(Distributed(shard=True), EMA()), "EMA does not work with"),
    "Fingerprints": (lambda: make(Distributed(shard=True), Fingerprints()), "Fingerprints does not work with"),
    "a step left out": (lambda: make(Distributed(shard=True), LeavesOut()), "a step was left out"),
    "a writer": (lambda: make(Distributed(shard=True), Reads()), "Reads.after_batch asks for the state on the first process"),
    "no such layer": (lambda: make(Distributed(shard=nn.LayerNorm)), "no layer of that class"),
    "only trained": (lambda: make(Distributed(shard=True), Checkpoint("never", every=None, steps=99, only_trained=True)), "only_trained"),
}


def with_layer(layer):
    learn = make(Distributed(shard=True))
    learn.model[0] = nn.Sequential(layer, learn.model[0])
    return learn


def test_what_cannot_be_in_parts_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (maker, words) in REFUSED.items():
        found = group(2, lambda rank, maker=maker: maker().train(1), tmp_path)
        assert sorted(each[0] for each in found) in (["error", "other"], ["other", "other"]), (name, found)
        assert all(words in each[1] for each in found), (name, found)
    with pytest.raises(TypeError, match="leave one out"): Distributed(shards=2, shard=True)
    with pytest.raises(TypeError, match="option of DDP"): Distributed(shard=True, bucket_cap_mb=1)
    with pytest.raises(TypeError, match="must be True, or a class of layers"): Distributed(shard="yes")


def test_after_a_rank_has_failed_nobody_takes_a_part_for_the_whole(tmp_path):
    def train(rank):
        learn = make(Distributed(shard=True), At("after_batch", lambda: 1 / 0, 1, 0, 2))
        with contextlib.suppress(BaseException): learn.train(1)
        found = []
        for ask in (learn.validate, learn.model.state_dict):
            try: ask()
            except Exception as error: found.append(f"{type(error).__name__}: {error}")
        return found

    for found in values(2, train, tmp_path):
        assert "holds only a part of the weights" in found[1] and ("come apart" in found[0])


def test_in_one_process_weights_stay_whole():
    ends = []
    for callbacks in ([Distributed(shard=True)], []):
        learn = make(*callbacks)
        learn.train(1, learning_rate=0.01)
        ends.append(weights(learn))
    assert torch.equal(*ends)
    assert Distributed(shard=True).watches and not Distributed(shards=2).watches


def test_the_state_of_an_optimiser_that_has_other_shapes_is_refused(tmp_path):
    def train(rank):
        learn = make(Distributed(shard=True), loaders=data())
        learn.optimiser = torch.optim.SGD(learn.model.parameters(), lr=0.1)
        learn.optimiser.state[learn.model[0].weight] = {"rows": torch.zeros(8)}
        learn.train(1)

    found = group(2, train, tmp_path)
    assert all("keeps rows of shape (8,) for a parameter of shape (8, 6)" in each[1] for each in found), found
