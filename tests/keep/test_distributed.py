"""Several processes: the same bits on 1, 2 and 4, exact means, and no rank that hangs. Ranks are forks of this process."""
import contextlib
import functools
import itertools
import os
import signal
import time

import pytest
import torch
from processes import LONG, At, Counting, as_forks, ctrl_c, group, make, metrics, outcome, values
from torch import nn

from learner.keep.checkpoint import Checkpoint
from learner.keep.distributed import Distributed
from learner.keep.ranks import OtherRankError, meet
from learner.keep.shards import ShardError
from learner.loop.stages import Callback, CancelBatchException, CancelEpochException, CancelTrainException
from learner.steer.accumulate import Accumulate
from learner.steer.stopping import EarlyStopping
from learner.watch.progress import Progress

pytestmark = as_forks


# ------------------------------------------------------------------------------------------------ the same bits

def sharded(*callbacks, **options):
    learn = make(Distributed(shards=4), metrics(), *callbacks, **options)
    learn.history.keep_steps = True
    return learn


@pytest.fixture(scope="module")
def straight():
    learn = sharded()
    learn.train(2, learning_rate=0.01)
    return outcome(learn)


def test_one_two_and_four_processes_have_the_same_bits_and_resume_on_each_other(tmp_path, straight):
    stops = [*itertools.product(range(2), range(6))] if LONG else [(0, 3), (1, 5)]

    def train(rank):
        learn = sharded()
        learn.train(2, learning_rate=0.01)
        return outcome(learn)

    def stop(world):
        def stopped(rank):
            for place in stops:
                learn = sharded(Checkpoint(tmp_path / f"{world} {place}"), At("before_batch", ctrl_c, world - 1, *place))
                with contextlib.suppress(KeyboardInterrupt): learn.train(2, learning_rate=0.01)
                assert tuple(learn.place)[:1] + tuple(learn.place)[2:] == (place[0], place[1] + 1)
        return stopped

    def go_on(rank):
        found = {}
        for before, place in itertools.product((1, 2, 4), stops):
            learn = sharded(seed=9)
            learn.train(resume=Checkpoint.latest(tmp_path / f"{before} {place}"))
            found[before, place] = outcome(learn)
        return found

    for world in (2, 4):
        assert values(world, train, tmp_path) == [straight] * world
        values(world, stop(world), tmp_path, 200)
    stop(1)(0)
    for after in (1, 2, 4):
        for found in [go_on(0)] if after == 1 else values(after, go_on, tmp_path, 300):
            for case, one in found.items(): assert one == straight, (case, after)


@pytest.mark.filterwarnings("ignore:the resumed training had callbacks:UserWarning")  # it does without, on purpose
def test_where_training_was_stopped_one_process_without_distributed_goes_on_with_whole_means(tmp_path):
    learn = make(Distributed(shards=2), Checkpoint(tmp_path / "run"), At("before_batch", ctrl_c), dropout=0)
    with pytest.raises(KeyboardInterrupt): learn.train(2, learning_rate=0.01)
    plain, fresh = make(dropout=0), make(dropout=0, seed=5)
    plain.train(2, learning_rate=0.01)
    fresh.train(resume=tmp_path / "run")
    assert fresh.history[1]["train_loss"] == pytest.approx(plain.history[1]["train_loss"], rel=1e-6)


def test_shards_refuse_by_name_what_would_be_wrong(tmp_path):
    for wrong, words in ((make(Distributed(shards=4), Accumulate(2)), "Accumulate"), (_with(nn.BatchNorm1d(6)), "0.0 is a BatchNorm1d"),
                         (_with(Counting()), "the buffer 0.0.seen")):
        with pytest.raises(ShardError, match=words): wrong.train(1)
    with pytest.raises(ShardError, match="power of two"): Distributed(shards=3)
    with pytest.raises(TypeError, match="option of DDP"): Distributed(shards=4, bucket_cap_mb=1)
    frozen = _with(nn.BatchNorm1d(6).eval())
    frozen.train(1)


def _with(layer):
    learn = make(Distributed(shards=4))
    learn.model[0] = nn.Sequential(layer, learn.model[0])
    return learn


# ------------------------------------------------------------------------------------------------ exact values by DDP

class Writer(Callback):
    writes = watches = True
    parts = ()

    def __init__(self): self.calls = 0

    def after_batch(self): self.calls += 1


def doubled(learn): return 2.0 * learn.batch_size  # nothing that the others could expect


def test_two_ranks_train_what_one_trains_and_measure_it_exactly(tmp_path):
    sgd = {"optimiser": torch.optim.SGD}  # sees a wrong factor of the gradients, unlike AdamW
    cases = {"ragged": {}, "ragged with SGD": sgd, "one example left": {"examples": 41}, "fewer examples than ranks": {"examples": 3, "batch_size": 1},
             "group": {"more": lambda: [Accumulate(3)]}, "a group by weight": {"more": lambda: [Accumulate(3, weight=doubled)], **sgd},
             "sums": {"sums": True, **sgd}, "a group of sums": {"sums": True, "more": lambda: [Accumulate(3)], **sgd},
             "a group in views": {"more": lambda: [Accumulate(3, weight=doubled)], "options": {"gradient_as_bucket_view": True}, **sgd},
             "stopping": {"more": lambda: [EarlyStopping("train_loss", 1, min_delta=9.0)]}}

    def train(rank):
        found = {}
        for name, case in cases.items():
            more = case.get("more", list)()
            sizes, options = {key: value for key, value in case.items() if key not in ("more", "options", "sums")}, case.get("options", {})
            learn = make(Distributed(**options), metrics(), *more, dropout=0, seed=0 if rank is None else 10 * rank, **sizes)
            if "sums" in case: learn.loss_func = functools.partial(nn.functional.cross_entropy, reduction="sum")
            learn.on("after_epoch", lambda learn: learn.log(beside=learn.validate()["validation_loss"]))
            learn.train(3, learning_rate=0.01)
            found[name] = [*learn.history.rows], torch.cat([p.detach().flatten() for p in learn.model.parameters()])
            assert all("forward" not in vars(module) for module in learn.model.modules()) and learn.ranks is None
        return found

    alone, ranks = train(None), values(2, train, tmp_path, 60)
    for name, found in itertools.product(cases, ranks):
        rows, weights = found[name]
        assert len(rows) == len(alone[name][0]) == (2 if name == "stopping" else 3), name
        torch.testing.assert_close(weights, alone[name][1], rtol=1e-4, atol=1e-6, msg=name)
        for row, wanted in zip(rows, alone[name][0], strict=True): assert row == pytest.approx(wanted, rel=1e-5), name
    for name in cases: assert ranks[0][name][0] == ranks[1][name][0]  # to the last bit


def test_the_first_rank_alone_writes_and_shows_and_collectives_are_few(tmp_path):
    def train(rank):
        writer = Writer()
        learn = make(writer, Progress(), Distributed(), Checkpoint(tmp_path / "run", minutes=1e-9), metrics())
        learn.train(2, learning_rate=0.01)
        counted = dict(meet(600.0).collectives)
        assert writer in learn.callbacks
        return writer.calls, counted

    (calls, counted), other = values(2, train, tmp_path)
    assert (calls, other[0]) == (12, 0) and counted == other[1]
    assert counted["tell"] == 2 * (6 + 2) + 4 + 2 + 1 + 12 * 3 + 2 and counted["add_up"] == 0
    # batches, passes, the call's two ends, DDP; a batch's checkpoint (whether, all here, its means), and an epoch's
    assert counted["gather"] == 4 + 1 + 12  # passes, the beginning of the call, a checkpoint a batch
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0002"

    def unlike(rank):
        learn = make(Distributed(), Progress())
        if rank: learn.model.append(nn.Linear(3, 3))
        learn.train(1)

    found = group(2, unlike, tmp_path)
    assert sorted(each[0] for each in found) == ["error", "other"]
    assert all("the model of rank 1 is not the model of rank 0" in each[1] for each in found)

    def shown(rank): make(Distributed(), Progress()).train(1)

    assert ["train_loss" in each[2] for each in group(2, shown, tmp_path)] == [True, False]


def test_in_one_process_it_does_nothing(tmp_path):
    found = []
    for callbacks in ([Distributed()], []):
        learn = make(*callbacks)
        learn.train(1, learning_rate=0.01)
        found.append(outcome(learn))
    assert found[0] == found[1] and learn.ranks is None and learn.is_main


# ------------------------------------------------------------------------------------------------ no rank hangs

def fail(): raise ValueError("bad data")
def cancel(kind):
    def cancelling(): raise kind
    return cancelling
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def terminate(): os.kill(os.getpid(), signal.SIGTERM)

HOOKS = ["before_train", "before_epoch", "before_training", "before_batch", "before_prepare", "before_predict", "after_loss", "before_backward",
         "after_backward", "before_step", "after_step", "after_batch", "after_training", "before_validation", "after_validation_batch",
         "after_validation", "after_epoch", "after_train"]
FAILURES = {"fail": fail, "kill": kill, "ctrl_c": ctrl_c, "terminate": terminate, "batch": cancel(CancelBatchException),
            "epoch": cancel(CancelEpochException), "train": cancel(CancelTrainException)}
MODES = [{"shards": 4}, {}, {"shard": True}]
EVERY = [(what, hook, bad, MODES[number % 3]) for number, (what, hook, bad) in enumerate(itertools.product(FAILURES, HOOKS, (0, 1)))]
SHORT = [("fail", "after_loss", 1, {}), ("kill", "before_step", 1, MODES[0]), ("train", "after_epoch", 0, {}), ("batch", "after_loss", 1, MODES[0]),
         ("fail", "before_train", 0, MODES[2]), ("kill", "after_validation_batch", 0, {}), ("ctrl_c", "before_predict", 1, MODES[2]),
         ("terminate", "after_epoch", 0, MODES[0]), ("batch", "after_batch", 0, MODES[0]), ("train", "before_epoch", 1, {}),
         ("epoch", "before_predict", 0, MODES[2]), ("train", "before_validation", 0, MODES[0])]


@functools.cache
def end_of_whole(shards):
    "Where a training ends that nothing stops, in one process that computes the same parts."
    learn = make(Distributed(shards=shards))
    learn.train(3, learning_rate=0.01)
    return outcome(learn), [parameter.detach() for parameter in learn.model.parameters()]


def check_goes_on(folder, shards):
    "From the last checkpoint, one process with as many parts comes to the same end; with shards, to the last bit."
    rest = make(Distributed(shards=shards or 2), seed=7)
    rest.train(resume=Checkpoint.latest(folder))
    bits, weights = end_of_whole(shards or 2)
    if shards: assert outcome(rest) == bits
    for one, other in zip(rest.model.parameters(), weights, strict=True): torch.testing.assert_close(one.detach(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("what", "hook", "bad", "options"), EVERY if LONG else SHORT)
def test_a_rank_that_fails_ends_all_with_its_error_shown_once(tmp_path, what, hook, bad, options):
    folder = tmp_path / "run"

    def train(rank):
        learn = make(Distributed(timeout=60, **options), Checkpoint(folder, steps=2), At(hook, FAILURES[what], bad))
        learn.train(3, learning_rate=0.01)

    began = time.monotonic()
    found = group(2, train, tmp_path, 40)
    assert time.monotonic() - began < 25  # training takes a few, and the end at most ten
    kinds = [each and each[0] for each in found]
    if what == "kill":
        assert found[bad] is None and found[1 - bad][0] == "error" and f"rank {bad}: it has ended without a word" in found[1 - bad][1]
    elif what == "fail":
        assert kinds[bad] == "error" and found[bad][1].startswith(f"ValueError: bad data (in At.{hook}")
        assert kinds[1 - bad] == "other" and found[1 - bad][1].startswith(f"rank {bad}: ValueError: bad data (in At.{hook}")
    elif what in ("ctrl_c", "terminate"):
        stop = "KeyboardInterrupt" if what == "ctrl_c" else "SystemExit: 143"
        assert kinds == ["error", "error"] and all(each[1].startswith(stop) for each in found), found
    elif kinds == ["value", "value"]: pass  # the stage ends for both where it would have ended anyway
    else: assert sorted(kinds) == ["error", "other"], found
    if Checkpoint.latest(folder) is not None: check_goes_on(folder, options.get("shards"))


@pytest.mark.parametrize(("press", "shards"), [(ctrl_c, 4), (terminate, None)])
def test_a_signal_to_one_rank_stops_all_after_the_same_batch(tmp_path, press, shards):
    def train(rank):
        learn = make(Distributed(shards=shards), At("before_batch", press, 1))
        try: learn.train(3, learning_rate=0.01)
        except (KeyboardInterrupt, SystemExit) as stop: assert not isinstance(stop, OtherRankError)
        place = tuple(learn.place)
        learn.train(resume=True)
        return place, outcome(learn)

    straight = make(Distributed(shards=shards))
    found = values(2, train, tmp_path)
    assert found[0] == found[1] and found[0][0] == (1, "train", 3)
    if shards:
        straight.train(3, learning_rate=0.01)
        assert found[0][1] == outcome(straight)


@pytest.mark.parametrize("shards", [None, 4])
def test_a_batch_that_all_ranks_cancel_is_left_out_and_training_goes_on(tmp_path, shards):
    def cancel(): raise CancelBatchException

    def train(rank):
        learn = make(Distributed(shards=shards), At("after_loss", cancel, epoch=0, batch=1), metrics())
        learn.train(2, learning_rate=0.01)
        return outcome(learn)

    one, other = values(2, train, tmp_path)
    assert one == other
    if shards: assert one == train(None)


def test_what_one_rank_does_alone_is_an_error_that_says_where(tmp_path):
    def train(rank):
        learn = make(Distributed())
        learn.on("after_batch", lambda batch_num: torch.rand(()) if rank and batch_num == 2 else None)
        learn.train(1, learning_rate=0.01)

    found = group(2, train, tmp_path)
    assert sorted(each[0] for each in found) == ["error", "other"]
    assert any("random numbers differ" in each[1] and "batch 3" in each[1] for each in found), found


# ------------------------------------------------------------------------------------------------ the debug mode

class Alone(Callback):
    "Makes a collective on one rank only."

    def __init__(self, hook, rank, make):
        self.rank, self.make = rank, make
        setattr(self, hook, self.on_one_rank)

    def on_one_rank(self, learn):
        if learn.ranks.rank == self.rank and learn.batch_num == 2: self.make(learn)


def all_reduce(learn): torch.distributed.all_reduce(torch.zeros(3))
def barrier(learn): torch.distributed.barrier()
def gather(learn): learn.ranks.group.gather(1)


@pytest.mark.parametrize(("hook", "rank", "make_it", "options"), [
    ("after_batch", 0, all_reduce, {}), ("after_loss", 1, gather, {"shards": 4}), ("after_training", 1, barrier, {"shard": True}),
    ("before_step", 0, gather, {})])
def test_a_collective_on_one_rank_only_is_an_error_that_names_the_hook_and_the_rank(tmp_path, hook, rank, make_it, options):
    def train(_):
        learn = make(Distributed(debug=True, timeout=20, **options), Alone(hook, rank, make_it), examples=24)
        learn.train(1, learning_rate=0.01)

    began = time.monotonic()
    found = group(2, train, tmp_path, 40)
    assert time.monotonic() - began < 15
    assert sorted(each[0] for each in found) in (["error", "other"], ["other", "other"]), found
    name = {all_reduce: "allreduce", gather: "allgather", barrier: "barrier"}[make_it]
    for each in found: assert f"rank {rank} makes {name} in Alone.{hook} (" in each[1], found


def test_a_function_is_named_too_and_without_a_mistake_the_debug_mode_changes_no_bit(tmp_path):
    def named(rank):
        learn = make(Distributed(debug=True))
        learn.on("after_epoch", lambda learn: learn.ranks.rank or gather(learn))
        learn.train(1)

    assert all("rank 0 makes allgather in FunctionCallback.after_epoch" in each[1] or "lambda" in each[1] for each in group(2, named, tmp_path))
    for options in ({}, {"shards": 4}, {"shard": True}):
        def train(rank, options=options):
            ends = []
            for debug in (False, True):
                learn = make(Distributed(debug=debug, **options), metrics(), EarlyStopping("train_loss", 3), Checkpoint(tmp_path / f"{debug} {options}"))
                learn.train(1, learning_rate=0.01)
                ends.append(outcome(learn)[:2])
            return ends
        for ends in values(2, train, tmp_path): assert ends[0] == ends[1]
