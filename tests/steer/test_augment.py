"""Augmentation against loops over single examples, mixes by hand, soft labels, and plain training."""
import math
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.check.reads import ReadBacks
from learner.loop.data import TensorLoader
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException
from learner.steer.augment import (
    TTA,
    BatchTransform,
    CutMix,
    Mixup,
    flip,
    normalise,
    random_crop,
    random_erase,
    random_flip,
)
from learner.watch.metrics import Metrics
from learner.watch.outputs import predictions

IMAGES = torch.rand(12, 3, 9, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x): return self.head(self.conv(x).relu().mean((2, 3)))


def learner(callbacks=None, model=None, loss_func=F.cross_entropy, data=(IMAGES, LABELS), batch_size=5, cls=Learner, lr=0.1, **loaders):
    loaders = loaders or {"train": TensorLoader(data, batch_size, shuffle=True), "validation": TensorLoader(data, batch_size), "test": TensorLoader(data, batch_size)}
    model = model or Net()
    return cls(model, torch.optim.SGD(model.parameters(), lr), loss_func, loaders, callbacks, device="cpu")


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


class Seen(Callback):
    "What went to the model and what came out, by phase."
    priority = 500

    def __init__(self): self.data, self.labels, self.losses, self.predictions, self.sizes = ({} for _ in range(5))

    def after_loss(self, learn):
        for kept, value in ((self.data, learn.data), (self.labels, learn.labels), (self.losses, learn.loss), (self.predictions, learn.predictions)):
            kept.setdefault(learn.phase, []).append(value.detach().clone())
        self.sizes.setdefault(learn.phase, []).append(learn.batch_size)


# Functions on images, against loops over single images

def windows(image, padding, fill):
    channels, height, width = image.shape
    padded = torch.full((channels, height + 2 * padding, width + 2 * padding), fill)
    padded[:, padding:padding + height, padding:padding + width] = image
    return [padded[:, i:i + height, j:j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]


@pytest.mark.parametrize("padding, fill", [(1, 0.0), (3, -2.0), (10, 0.5)])
def test_a_crop_is_one_of_the_windows_and_each_image_has_its_own(padding, fill):
    torch.manual_seed(0)
    made = random_crop(padding, fill)(IMAGES)
    found = [[torch.equal(crop, window) for window in windows(image, padding, fill)].index(True) for image, crop in zip(IMAGES, made, strict=True)]
    assert made.shape == IMAGES.shape and len(set(found)) > 3


def test_a_crop_with_given_random_numbers():
    torch.manual_seed(5)
    tops, lefts = torch.randint(5, (2, 12)).tolist()
    torch.manual_seed(5)
    made = random_crop(2)(IMAGES)
    for image, crop, top, left in zip(IMAGES, made, tops, lefts, strict=True):
        assert torch.equal(crop, windows(image, 2, 0.0)[5 * top + left])


def test_crops_are_spread_evenly():
    dot = torch.zeros(9000, 1, 5, 5)
    dot[:, :, 2, 2] = 1
    torch.manual_seed(1)
    counts = random_crop(1)(dot).sum((0, 1))
    assert counts[1:4, 1:4].min() > 900 and counts.sum() == 9000  # 1000 each, with a standard deviation of 30


def test_flips():
    torch.manual_seed(0)
    turn = torch.rand(12, 1, 1, 1).flatten() < 0.5
    torch.manual_seed(0)
    made = random_flip()(IMAGES)
    assert 0 < turn.sum() < 12
    for image, flipped, turned in zip(IMAGES, made, turn, strict=True):
        assert torch.equal(flipped, torch.stack([image[:, :, 6 - i] for i in range(7)], 2) if turned else image)
    assert torch.equal(random_flip(1)(IMAGES), flip(IMAGES)) and torch.equal(random_flip(0)(IMAGES), IMAGES)


def test_an_erased_part_is_a_rectangle_of_the_size_and_form_asked_for():
    torch.manual_seed(0)
    ones = torch.ones(500, 2, 28, 32)
    made = random_erase(1, 0.1, 0.2, ratio=2, fill=7)(ones)
    sizes, places = [], set()
    for image in made:
        erased = image[0] == 7
        assert torch.equal(image[0], image[1])
        rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
        tall, wide = len(rows), len(columns)
        assert rows[-1] - rows[0] + 1 == tall and columns[-1] - columns[0] + 1 == wide and erased.sum() == tall * wide
        assert (image[0][~erased] == 1).all()
        assert 0.08 < tall * wide / (28 * 32) < 0.23 and 0.4 < tall / wide < 2.4  # rounded to whole pixels
        sizes.append(tall * wide / (28 * 32))
        places |= {("top", int(rows[0])), ("left", int(columns[0])), ("bottom", int(rows[-1])), ("right", int(columns[-1]))}
    assert abs(sum(sizes) / 500 - 0.15) < 0.01
    assert {("top", 0), ("left", 0), ("bottom", 27), ("right", 31)} <= places  # up to the edges


def test_erasing_some_and_all_of_an_image():
    torch.manual_seed(0)
    share = (random_erase(0.3)(torch.ones(4000, 1, 8, 8)) == 0).flatten(1).any(1).float().mean()
    assert abs(share - 0.3) < 0.03
    assert random_erase(1, 1, 1, ratio=1)(torch.ones(5, 3, 6, 6)).sum() == 0
    assert (random_erase(1, 1e-9, 1e-9)(torch.ones(5, 1, 6, 6)) == 0).sum() == 5  # never less than a pixel


def test_normalise_per_channel_and_for_all():
    by_hand = torch.stack([torch.stack([(image[c] - m) / s for c, (m, s) in enumerate(((0.1, 0.5), (0.2, 2.0), (0.3, 4.0)))]) for image in IMAGES])
    assert torch.equal(normalise([0.1, 0.2, 0.3], (0.5, 2.0, 4.0))(IMAGES), by_hand)
    assert torch.equal(normalise(0.5, 0.25)(IMAGES), (IMAGES - 0.5) / 0.25)
    assert torch.equal(normalise([0.1, 0.2, 0.3], 2.0)(IMAGES), normalise([0.1, 0.2, 0.3], [2.0] * 3)(IMAGES))
    assert torch.equal(normalise(torch.tensor([0.5]), 1)(IMAGES), IMAGES - 0.5)
    assert normalise(127.5, 127.5)(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[[[-1.0, 1.0]]]]


FUNCTIONS = [random_crop(2), random_flip(), random_erase(), normalise([0.1, 0.2, 0.3], 2.0)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_functions_leave_their_input_and_its_kind_alone_and_repeat_with_the_seed(function, dtype):
    images = IMAGES.to(dtype)
    before = images.clone()
    torch.manual_seed(0)
    made = function(images)
    torch.manual_seed(0)
    assert torch.equal(function(images), made) and torch.equal(images, before) and made.dtype == dtype and made.shape == images.shape
    assert pickle.loads(pickle.dumps(function)) == function == deepcopy(function)


@pytest.mark.parametrize("function", FUNCTIONS[:3], ids=repr)
def test_bytes_stay_bytes(function): assert function((IMAGES * 255).byte()).dtype == torch.uint8


# BatchTransform

def test_the_function_acts_in_training_alone_and_the_data_stay():
    def double(data): return data * 2

    before, seen = IMAGES.clone(), Seen()
    learner([BatchTransform(double), seen]).train(1)
    found = {phase: torch.cat(batches).sum().item() for phase, batches in seen.data.items()}
    assert found == pytest.approx({"train": 2 * IMAGES.sum().item(), "validation": IMAGES.sum().item(), "test": IMAGES.sum().item()}, rel=1e-5)
    assert torch.equal(IMAGES, before)


def test_training_is_that_of_a_plain_loop():
    transform = random_crop(2)
    learn, model = learner([BatchTransform(transform), BatchTransform(random_flip())]), Net()
    torch.manual_seed(1)
    learn.train(2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    loader = TensorLoader((IMAGES, LABELS), 5, shuffle=True)
    torch.manual_seed(1)
    for _ in range(2):
        for x, y in loader:
            F.cross_entropy(model(random_flip()(transform(x))), y).backward()
            optimiser.step()
            optimiser.zero_grad()
    assert torch.equal(weights(learn), torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize("make", [lambda: BatchTransform(random_erase()), lambda: Mixup(), lambda: CutMix()])
def test_training_in_two_parts_with_the_random_state_kept_is_training_in_one(make):
    torch.manual_seed(0)
    whole = learner(make())
    whole.train(2)
    torch.manual_seed(0)
    half = learner(make())
    half.train(1)
    state, parts = torch.get_rng_state(), (half.model.state_dict(), half.history)
    torch.rand(100)
    rest = learner(make())
    rest.model.load_state_dict(parts[0])
    rest.history = parts[1]
    torch.set_rng_state(state)
    rest.train(1)
    assert torch.equal(weights(whole), weights(rest))


def test_any_pass_can_be_named():
    for phases in (["train", "validation", "test"], "test", ("validation",)):
        seen = Seen()
        learner([BatchTransform(lambda data: data * 0, phases=phases), seen]).train(1)
        assert {phase for phase, batches in seen.data.items() if torch.cat(batches).sum() == 0} == {*([phases] if isinstance(phases, str) else phases)}


def test_labels_go_along_and_may_be_as_many_as_they_like():
    def twice(data, labels): return torch.cat([data, -data]), torch.cat([labels, labels])

    seen = Seen()
    learner([BatchTransform(twice, labels=True), seen]).train(1)
    assert seen.sizes == {"train": [10, 10, 4], "validation": [5, 5, 2], "test": [5, 5, 2]}
    for data, labels in zip(seen.data["train"], seen.labels["train"], strict=True):
        half = len(data) // 2
        assert torch.equal(data[:half], -data[half:]) and torch.equal(labels[:half], labels[half:])


def test_a_single_tensor_stays_its_own_label():
    seen = Seen()
    model = nn.Sequential(nn.Flatten(), nn.Linear(189, 189), nn.Unflatten(1, (3, 9, 7)))
    learner([BatchTransform(lambda data: data * 0), seen], model, F.mse_loss, IMAGES).train(1)
    assert torch.cat(seen.data["train"]).sum() == 0 and torch.cat(seen.labels["train"]).sum() == pytest.approx(IMAGES.sum().item(), rel=1e-5)


def test_transforms_come_before_other_hooks_and_mixing_after_transforms():
    order = []

    class First(Callback):
        def after_prepare(self, data): order.append(("hook", data.max().item()))

    class Noted(Mixup):
        def mix(self, data, positions):
            order.append(("mix", data.max().item()))
            return super().mix(data, positions)

    batch = [(torch.ones(4, 3, 9, 7), LABELS[:4])]
    learner([First(), Noted(), BatchTransform(lambda data: data + 1), BatchTransform(lambda data: data * 3)], train=batch).train(1)
    assert order == [("mix", 6.0), ("hook", 6.0)]


def test_what_functions_return_is_checked():
    with pytest.raises(TypeError, match="lose returned None; it must return the data that it makes"):
        def lose(data): data.mul_(1)
        learner(BatchTransform(lose)).train(1)
    with pytest.raises(TypeError, match="returned a Tensor; with labels=True it returns a pair"):
        learner(BatchTransform(lambda data, labels: data, labels=True)).train(1)


# Mixup and CutMix

class Fixed(Mixup):
    "A given share, and partners in a given order."
    def __init__(self, share): super().__init__(); self.share = share
    def draw(self): return torch.tensor(self.share, dtype=torch.float64)


def partners_of(seed, size):
    torch.manual_seed(seed)
    return torch.randperm(size)


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_a_mix_by_hand(share):
    data = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], dtype=torch.float64)
    mixed, kept = Fixed(share).mix(data, torch.tensor([2, 0, 1]))
    assert kept == 0.7  # the larger share is the example's own
    by_hand = [[0.7 * 1 + 0.3 * 3, 0.7 * 10 + 0.3 * 30], [0.7 * 2 + 0.3 * 1, 0.7 * 20 + 0.3 * 10], [0.7 * 3 + 0.3 * 2, 0.7 * 30 + 0.3 * 20]]
    assert torch.allclose(mixed, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-14)


def test_a_structure_is_mixed_leaf_by_leaf():
    data = {"a": torch.arange(3.0), "b": (torch.arange(6.0).view(3, 2),)}
    mixed, _ = Fixed(0.75).mix(data, torch.tensor([1, 2, 0]))
    assert mixed["a"].tolist() == [0.25, 1.25, 1.5] and mixed["b"][0].tolist() == [[0.5, 1.5], [2.5, 3.5], [3.0, 4.0]]


@pytest.mark.parametrize("make", [Fixed, Mixup, CutMix])
def test_the_loss_is_that_of_soft_labels_and_the_step_is_that_of_the_loss(make):
    images, model = IMAGES.double(), Net().double()
    seen, start = Seen(), deepcopy(model)
    shares = []

    class Noted(make):
        def mix(self, data, order):
            mixed, share = super().mix(data, order)
            shares.append(share)
            return mixed, share

    learn = learner([Noted(0.8), seen], model, train=[(images, LABELS)])
    torch.manual_seed(7)
    learn.train(1)
    order = partners_of(7, 12)  # it is what is drawn first
    mixed, share = seen.data["train"][0], shares[0].double()
    soft = share * F.one_hot(LABELS, 4) + (1 - share) * F.one_hot(LABELS[order], 4)
    loss = F.cross_entropy(start(mixed), soft)
    assert abs(loss - seen.losses["train"][0]) < 1e-12
    loss.backward()
    for parameter, trained in zip(start.parameters(), model.parameters(), strict=True):
        assert torch.allclose(parameter - 0.1 * parameter.grad, trained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss_func", [nn.MultiMarginLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), lambda p, y: (p[:, 0] - y).abs().mean()])
def test_the_loss_is_mixed_for_any_loss_function(loss_func):
    seen = Seen()
    learn = learner([Fixed(0.8), seen], loss_func=loss_func, train=[(IMAGES, LABELS)])
    torch.manual_seed(7)
    learn.train(1)
    p, order = seen.predictions["train"][0], partners_of(7, 12)
    by_hand = 0.8 * loss_func(p, LABELS) + (1 - 0.8) * loss_func(p, LABELS[order])
    assert seen.losses["train"][0].dtype == torch.float32 and abs(by_hand - seen.losses["train"][0]) < 1e-6


def test_a_learner_with_its_own_loss_is_mixed_by_it():
    class Squared(Learner):
        def compute_loss(self): self.loss = F.cross_entropy(self.predictions, self.labels) ** 2

    seen = Seen()
    learn = learner([Fixed(0.8), seen], cls=Squared, train=[(IMAGES, LABELS)])
    torch.manual_seed(7)
    learn.train(1)
    p, order = seen.predictions["train"][0], partners_of(7, 12)
    by_hand = 0.8 * F.cross_entropy(p, LABELS) ** 2 + 0.2 * F.cross_entropy(p, LABELS[order]) ** 2
    assert abs(by_hand - seen.losses["train"][0]) < 1e-6


@pytest.mark.parametrize("make", [Mixup, CutMix])
def test_metrics_see_the_labels_and_validation_is_as_ever(make):
    def label_sum(predictions, labels): return labels.float().mean()

    mixed, plain = learner([make(), Metrics(label_sum), Seen()]), learner([Metrics(label_sum), Seen()])
    seen = mixed.callbacks[-1]
    plain.train(1, learning_rate=0)
    mixed.train(1, learning_rate=0)
    row, other = mixed.history[-1], plain.history[-1]
    assert row["train_label_sum"] == other["train_label_sum"] and row["train_loss"] != other["train_loss"]
    assert {name: value for name, value in row.items() if not name.startswith("train")} == {name: value for name, value in other.items() if not name.startswith("train")}
    assert torch.equal(torch.cat(seen.data["validation"]), IMAGES)


def test_mixing_all_with_a_share_or_with_the_rest_is_the_same_set():
    data, order = torch.arange(5.0), torch.tensor([3, 0, 4, 1, 2])
    one = data * 0.3 + data[order] * 0.7
    other = Fixed(0.3).mix(data, order.argsort())[0]
    assert torch.allclose(one.sort().values, other.sort().values)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 2.0])
def test_shares_have_the_moments_of_the_distribution(alpha):
    torch.manual_seed(0)
    mixing = Mixup(alpha)
    shares = torch.stack([mixing.draw() for _ in range(4000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    assert shares.min() >= 0 and shares.max() <= 1


def test_the_share_of_cutmix_is_the_area_that_stays():
    numbers = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 13, 8)
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    torch.manual_seed(0)
    clipped, shares = 0, []
    for _ in range(500):
        mixed, share = CutMix().mix(numbers, order)
        own = (mixed == numbers).flatten(1).double().mean(1)
        assert torch.allclose(own, share.double().expand(6), atol=1e-6)
        assert ((mixed == numbers) | (mixed == numbers[order])).all()
        shares.append(share.item())
        foreign = (mixed[0, 0] != 0)
        if foreign.any():
            rows, columns = foreign.any(1).nonzero().flatten(), foreign.any(0).nonzero().flatten()
            assert foreign.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            clipped += bool(rows[0] == 0 or rows[-1] == 12)
    assert clipped > 50 and min(shares) < 0.2 and max(shares) > 0.95


def test_a_rectangle_of_cutmix_has_the_proportions_of_the_image():
    class Middle(CutMix):
        def draw(self): return torch.tensor(0.75, dtype=torch.float64)  # half of each side

    torch.manual_seed(0)
    found = [(1 - Middle().mix(torch.zeros(2, 1, 20, 40), torch.tensor([1, 0]))[1].item()) * 800 for _ in range(300)]
    assert max(found) == pytest.approx(10 * 20, abs=1e-3) and min(found) < 120  # whole, and cut off at the edge


def test_data_and_labels_of_the_loader_are_not_touched():
    batch = (IMAGES.clone(), LABELS.clone())
    for make in (Mixup, CutMix): learner(make(), train=[batch]).train(2)
    assert torch.equal(batch[0], IMAGES) and torch.equal(batch[1], LABELS)


def test_a_batch_that_is_cancelled_and_the_one_after_it():
    class Cancel(Callback):
        def before_predict(self, batch_num):
            if batch_num == 0: raise CancelBatchException

    callback = Mixup()
    learn = learner([callback, Cancel()])
    learn.train(2)
    assert callback.weight is None and callback.labels is None and math.isfinite(learn.history[-1]["train_loss"])


def test_autocast_reaches_both_losses():
    class Bfloat16(Callback):
        def around_predict(self):
            with torch.autocast("cpu", torch.bfloat16): yield
        around_loss = around_predict

    kinds = []

    def loss_func(predictions, labels):
        kinds.append((predictions.dtype, torch.is_autocast_enabled("cpu")))
        return F.cross_entropy(predictions, labels)
    learner([Mixup(), Bfloat16()], loss_func=loss_func, train=[(IMAGES, LABELS)]).train(1)
    assert kinds == [(torch.bfloat16, True)] * 2


# Test-time augmentation

def by_hand(model, images, views, probabilities=False):
    with torch.no_grad(): outputs = [model(view(images)) for view in (lambda x: x, *views)]
    if probabilities: return (sum(output.softmax(1) for output in outputs) / len(outputs)).log()
    return sum(outputs) / len(outputs)


def up(images): return images.flip(-2)


@pytest.mark.parametrize("combine", ["mean", "probabilities"])
@pytest.mark.parametrize("views", [[flip], [flip, up]])
def test_predictions_and_loss_are_those_of_the_mean(views, combine):
    learn = learner(TTA(views, combine))
    learn.model.double()
    learn.dataloaders = {name: TensorLoader((IMAGES.double(), LABELS), 5) for name in ("validation", "test")}
    found = predictions(learn)
    expected = by_hand(learn.model, IMAGES.double(), views, combine == "probabilities")
    assert torch.allclose(found.predictions, expected, rtol=0, atol=1e-12)
    loss = F.cross_entropy(expected, LABELS).item()
    assert learn.validate()["validation_loss"] == pytest.approx(loss, abs=1e-12)
    assert learn.test()["test_loss"] == pytest.approx(loss, abs=1e-12)
    if combine == "probabilities": assert torch.allclose(found.predictions.exp().sum(1), torch.ones(12).double())


def test_it_comes_for_one_call_and_goes_again():
    learn = learner()
    alone = learn.test()["test_loss"]
    assert learn.test(TTA(flip))["test_loss"] == pytest.approx(F.cross_entropy(by_hand(learn.model, IMAGES, [flip]), LABELS).item(), abs=1e-6) != alone
    assert learn.test()["test_loss"] == alone


def test_training_is_as_without_it_and_metrics_see_the_mean():
    def first(predictions, labels): return predictions[:, 0].mean()

    plain, averaged = learner(Metrics(first)), learner([Metrics(first), TTA([flip, up])])
    for learn in (plain, averaged): learn.train(2)
    assert torch.equal(weights(plain), weights(averaged))
    assert plain.history["train_first"] == averaged.history["train_first"]
    mean = by_hand(averaged.model, IMAGES, [flip, up])[:, 0].mean().item()
    assert averaged.history[-1]["validation_first"] == pytest.approx(mean, abs=1e-6)


def test_a_number_draws_views_with_the_transforms_of_training():
    transforms = [BatchTransform(random_crop(2)), BatchTransform(random_flip()), BatchTransform(lambda x: x * 3, phases=["train", "validation"])]
    learn = learner([*transforms, TTA(3)], validation=[(IMAGES, LABELS)])
    def view(images): return random_flip()(random_crop(2)(images))

    torch.manual_seed(4)
    found = learn.validate()["validation_loss"]
    torch.manual_seed(4)
    expected = F.cross_entropy(by_hand(learn.model, IMAGES * 3, [view] * 3), LABELS).item()
    assert found == pytest.approx(expected, abs=1e-6)


def test_combine_can_be_a_function_of_any_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x): return {"scores": self.net(x), "shape": x.shape}

    def loss_func(predictions, labels): return F.cross_entropy(predictions["scores"], labels)

    def largest(outputs): return {"scores": torch.stack([output["scores"] for output in outputs]).amax(0)}

    learn = learner(TTA(flip, largest), Pair(), loss_func)
    with torch.no_grad(): scores = torch.maximum(learn.model.net(IMAGES), learn.model.net(flip(IMAGES)))
    assert learn.validate()["validation_loss"] == pytest.approx(F.cross_entropy(scores, LABELS).item(), abs=1e-6)
    with pytest.raises(TypeError, match="the model gave a dict, and only tensors have a mean; pass combine="):
        learner(TTA(flip), Pair(), loss_func).validate()


def test_the_data_are_put_back_also_after_an_error():
    def broken(images): raise OSError("no view")

    seen = Seen()
    learner([TTA(flip), seen]).validate()
    assert torch.equal(torch.cat(seen.data["validation"]), IMAGES)
    learn = learner(TTA([flip, broken]))
    with pytest.raises(OSError, match="no view"): learn.validate()
    learn.remove(*learn.callbacks)
    assert math.isfinite(learn.validate()["validation_loss"])


def test_a_view_must_keep_the_examples():
    with pytest.raises(ValueError, match=r"shapes \(5, 4\) and \(2, 4\); a view must keep the number of examples"):
        learner(TTA(lambda images: images[:2])).validate()


# All of them

def test_nothing_is_read_back_from_the_device():
    learn = learner([*(BatchTransform(function) for function in FUNCTIONS), CutMix(), TTA(2, "probabilities")])
    with ReadBacks(learn) as reads: learn.train(1)
    assert not reads.found
    learn = learner([BatchTransform(lambda data: data), Mixup()])
    with ReadBacks(learn) as reads: learn.train(1)
    assert not reads.found


def test_learners_with_all_of_them_can_be_copied_and_saved():
    learn = learner([*(BatchTransform(function) for function in FUNCTIONS), CutMix(), TTA(2)])
    torch.manual_seed(0)
    copy = pickle.loads(pickle.dumps(learn))
    for each in (learn, copy):
        torch.manual_seed(0)
        each.train(1)
    assert torch.equal(weights(learn), weights(copy))
    assert repr(learn.callbacks[0]) == "BatchTransform(random_crop(padding=2, fill=0.0))"
    assert (repr(Mixup()), repr(CutMix()), repr(TTA([flip, random_flip()])), repr(TTA(4))) == ("Mixup(alpha=0.4)", "CutMix(alpha=1)", "TTA(flip, random_flip(probability=0.5))", "TTA(4)")


def no_loss_stage():
    class Own(Learner):
        def train_batch(self):
            self.act("prepare", "predict")
            self.loss = F.cross_entropy(self.predictions, self.labels)
            self.act("backward", "step")
    learner(Mixup(), cls=Own).train(1)


BAD = [
    (lambda: random_crop(0), ValueError, "padding is 0; it must be a whole number of at least 1"),
    (lambda: random_crop(2, fill="mean"), ValueError, "fill is 'mean'; it must be a finite number"),
    (lambda: random_flip(1.5), ValueError, "probability is 1.5; it must be from 0 to 1"),
    (lambda: random_erase(-1), ValueError, "probability is -1; it must be a finite number of at least 0"),
    (lambda: random_erase(least=0.5, most=0.1), ValueError, "least is 0.5 and most is 0.1; the shares must go up, from above 0"),
    (lambda: random_erase(ratio=0.3), ValueError, "ratio is 0.3; it must be a finite number of at least 1"),
    (lambda: normalise(0.5, 0), ValueError, "std is 0; it must be greater than 0"),
    (lambda: normalise("0.5"), ValueError, "mean is '0.5'; it must be a finite number"),
    (lambda: normalise([0.1, math.nan]), ValueError, "mean is nan; it must be a finite number"),
    (lambda: normalise([0.1, 0.2])(IMAGES), ValueError, "normalise: mean has 2 numbers, and the images have 3 channels; give one for all, or one for each"),
    (lambda: random_crop(1)(torch.rand(5, 3)), TypeError, "random_crop got a tensor of shape (5, 3); it takes a batch of images, a tensor NxCxHxW; pass Learner(..., inputs=...) to give the model the images alone"),
    (lambda: random_flip()((IMAGES, IMAGES)), TypeError, "random_flip got a tuple; it takes a batch of images, a tensor NxCxHxW; pass Learner(..., inputs=...) to give the model the images alone"),
    (lambda: BatchTransform(random_crop), TypeError, "function: random_crop is a class; pass an instance: random_crop(...)"),
    (lambda: BatchTransform("flip"), TypeError, "function is 'flip'; pass a function, or one of random_crop(...), random_flip() ..."),
    (lambda: BatchTransform(flip, phases="valid"), ValueError, "phases: 'valid' is not one of ['train', 'validation', 'test']; did you mean validation?"),
    (lambda: BatchTransform(flip, phases=[]), ValueError, "phases is empty; give one or more of ['train', 'validation', 'test']"),
    (lambda: BatchTransform(flip, labels=True), TypeError, "function: flip cannot be called as function(data, labels)"),
    (lambda: Mixup(0), ValueError, "alpha is 0; it must be greater than 0"),
    (lambda: CutMix(-1), ValueError, "alpha is -1; it must be a finite number of at least 0"),
    (lambda: learner([Mixup(), CutMix()]), ValueError, "Mixup.loss and CutMix.loss both replace loss; only one callback can"),
    (lambda: learner(Mixup(), loss_func=None).train(1), ValueError, "Mixup needs a loss_func to compare predictions with both labels, and this model computes its own loss; pass loss_func to the learner"),
    (lambda: learner(Mixup(), data=((IMAGES * 255).byte(), LABELS)).train(1), TypeError, "Mixup got torch.uint8 of shape (5, 3, 9, 7); it mixes floating-point tensors with a row for each of the 5 examples: convert them with a BatchTransform"),
    (lambda: learner(CutMix(), nn.Linear(7, 4), data=(torch.rand(8, 7), LABELS[:8])).train(1), TypeError, "CutMix got a tensor of shape (5, 7); it takes a batch of images, a tensor NxCxHxW; pass Learner(..., inputs=...) to give the model the images alone"),
    (no_loss_stage, ValueError, "Mixup mixed the data and not the loss, since this learner's own train_batch has no stage loss; let it call act(\"loss\")"),
    (lambda: TTA([]), ValueError, "views is empty; give a function, as in TTA([flip])"),
    (lambda: TTA(0), ValueError, "views is 0; it must be a whole number of at least 1"),
    (lambda: TTA(2.5), ValueError, "views is 2.5; it must be a whole number of at least 1"),
    (lambda: TTA([flip, random_flip]), TypeError, "views[1]: random_flip is a class; pass an instance: random_flip(...)"),
    (lambda: TTA("flip"), TypeError, "views[0] is 'f'; pass a function, or one of random_crop(...), random_flip() ..."),
    (lambda: TTA(None), TypeError, "views[0] is None; pass a function, or one of random_crop(...), random_flip() ..."),
    (lambda: TTA(flip, combine="maen"), ValueError, "combine is 'maen'; it must be one of ['mean', 'probabilities'], or a function; did you mean mean?"),
    (lambda: learner(TTA(3)).train(1), ValueError, "TTA(3) draws views with the learner's transforms for training, and it has none; pass functions, as in TTA([flip])"),
    (lambda: learner(TTA(lambda data: None)).validate(), TypeError, "<lambda> returned None; it must return the data that it makes"),
    (lambda: learner(TTA(flip, "probabilities"), nn.Sequential(nn.Flatten(0), nn.Linear(945, 1), nn.Flatten(0)), lambda p, y: p.mean(), batch_size=5, data=(IMAGES[:5], LABELS[:5])).validate(), ValueError, "TTA: combine=\"probabilities\" needs the scores of classes, N x C; the model gave (1,); use combine=\"mean\""),
]


@pytest.mark.parametrize("wrong, kind, message", BAD, ids=[message[:50] for _, _, message in BAD])
def test_bad_input(wrong, kind, message):
    with pytest.raises(kind) as caught: wrong()
    assert str(caught.value) == message
