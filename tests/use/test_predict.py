"""Whatever form a question has, the answer is that of a validation."""
import gc
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from learner.loop.data import DataLoaders, TensorLoader
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException
from learner.steer.augment import BatchTransform, normalise
from learner.steer.update import EMA
from learner.use.answers import Answer, answers, probabilities_of
from learner.use.inputs import ImageReader, InputError, Preparation, form_of, open_image
from learner.use.predict import OpenPass, Predictor, predict, predictor_of
from learner.watch.outputs import predictions


class Counts(Callback):
    "Adds a constant to what the model says, so that it can be seen whether it took part."
    def after_predict(self, learn): learn.predictions = learn.predictions + 100


class CancelsAll(Callback):
    def before_predict(self, learn): raise CancelBatchException


@pytest.fixture(scope="module")
def learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 10))
    steer = [BatchTransform(normalise(0.3, 0.4), phases=("train", "validation", "test")), EMA(0.9)]
    learn = Learner(model, torch.optim.AdamW, F.cross_entropy, digits(), steer)
    learn.train(2, learning_rate=0.01)
    return learn


@pytest.fixture(scope="module")
def images(learn): return next(iter(learn.dataloaders["test"]))[0]


def test_predict_is_what_a_validation_says_bit_for_bit(learn):
    rows = predictions(learn, "validation", inputs=False)
    data = torch.cat([batch[0] for batch in learn.dataloaders["validation"]])
    assert torch.equal(predict(learn, data, batch_size=64).outputs, rows.predictions)
    assert torch.equal(predictor_of(learn, batch_size=64)(data).outputs, rows.predictions)
    assert torch.equal(predict(learn, learn.dataloaders["validation"]).outputs, rows.predictions)


def test_one_example_is_the_same_bit_for_bit_and_a_batch_nearly(learn, images):
    predictor = predictor_of(learn)
    together = predictor(images)
    for i in range(10):
        alone = learn.predict(images[i])
        assert torch.equal(predictor.one(images[i]).output, alone.output)
        assert (alone.output - together[i].output).abs().max() < 1e-5
        assert alone.label == together[i].label and isinstance(alone, Answer)


def test_predicting_leaves_learner_and_random_numbers_as_they_were(learn, images):
    before, random = learn.fingerprint(), torch.rand(1, generator=torch.Generator().manual_seed(0))
    modes = [module.training for module in learn.model.modules()]
    predictor = predictor_of(learn)
    predictor(images)
    learn.predict(images)
    assert learn.fingerprint() == before and random == torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert modes == [module.training for module in learn.model.modules()]


def test_the_learner_may_train_on_while_a_predictor_answers(images):
    torch.manual_seed(0)
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.optim.SGD, F.cross_entropy, digits())
    learn.train(1, learning_rate=0.1)
    predictor = predictor_of(learn)
    first = predictor(images).outputs
    asked = []
    learn.on("after_batch", lambda: asked.append(torch.equal(predictor(images).outputs, first)))
    learn.train(1, learning_rate=0.1)
    assert asked and all(asked) and not torch.equal(learn.predict(images).outputs, first)


@pytest.mark.parametrize("given", ["tensor", "array", "lists", "picture", "path", "bytes"])
def test_forms_of_one_example(learn, images, tmp_path, given):
    picture = Image.fromarray((images[0, 0] * 255).round().byte().numpy())
    path = tmp_path / "digit.png"
    picture.save(path)
    form = {"tensor": images[0], "array": images[0].numpy().astype(np.float64), "lists": images[0].tolist(),
            "picture": picture, "path": path, "bytes": path.read_bytes()}[given]
    answer = learn.predict(form)
    expected = predict(learn, images[:1])[0]
    near = 0 if given in ("tensor", "array", "lists") else 0.1  # a picture has 256 values
    assert (answer.output - expected.output).abs().max() <= near and answer.label == expected.label
    both = predict(learn, [form, images[0]])
    assert len(both) == 2 and both.labels[0] == both.labels[1]


def test_a_transform_of_a_data_set_reads_pictures():
    class Pictures(torch.utils.data.Dataset):
        classes = ["dark", "light"]
        def __init__(self, transform): self.transform = transform
        def __len__(self): return 8
        def __getitem__(self, i): return self.transform(Image.new("RGB", (4, 4), (40 * i,) * 3)), int(i > 3)
    def transform(image): return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 100 - 1
    loaders = DataLoaders.from_datasets(train=Pictures(transform), batch_size=4, num_workers=0)
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.optim.SGD, F.cross_entropy, loaders)
    image = Image.new("RGB", (4, 4), (40, 40, 40))
    assert torch.equal(learn.predict(image).output, learn.predict(transform(image)).output)
    assert learn.predict(image.convert("L")).label in Pictures.classes


def test_several_inputs_by_name_and_by_position():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
        def forward(self, x, scale): return self.linear(x) * scale[:, None]
    x, scale, y = torch.randn(20, 3), torch.rand(20), torch.arange(20) % 2
    model = Two()
    for data, question in [({"x": x, "scale": scale, "labels": y}, {"x": x[0], "scale": scale[0]}),
                           ((x, scale, y), (x[0], scale[0]))]:
        learn = Learner(model, torch.optim.SGD, F.cross_entropy, {"validation": TensorLoader(data)})
        expected = model(x[:1], scale[:1])[0]
        assert torch.equal(learn.predict(question).output, expected)
        assert torch.equal(predictor_of(learn)(question).output, expected)
        assert len(learn.predict(learn.dataloaders["validation"])) == 20


def test_labels_under_another_key_do_not_stand_in_the_way():
    data = {"x": torch.randn(20, 3), "target": torch.arange(20) % 2}
    class Net(nn.Linear):
        def forward(self, x): return super().forward(x)
    learn = Learner(Net(3, 2), torch.optim.SGD, F.cross_entropy, {"validation": TensorLoader(data)}, labels="target")
    assert torch.equal(learn.predict({"x": data["x"]}).outputs, learn.model(data["x"]))
    learn = Learner(Net(3, 2), torch.optim.SGD, F.cross_entropy, {"validation": TensorLoader(data)}, labels="target", inputs="x")
    assert torch.equal(predictor_of(learn)(data["x"]).outputs, learn.model(data["x"]))


def test_callbacks_that_change_predictions_take_part(learn, images):
    plain = learn.predict(images).outputs
    steering = Learner(learn.model, None, F.cross_entropy, learn.dataloaders, [*learn.callbacks, Counts()])
    assert torch.equal(steering.predict(images).outputs, plain + 100)
    assert torch.equal(predictor_of(steering)(images).outputs, plain + 100)


@pytest.mark.parametrize("wrong, words", [
    (torch.zeros(8, 8), "one example is float32 of shape (1, 8, 8)"),
    (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "convert bytes as the training data were"),
    (torch.zeros(2, 1, 5, 5), "those of training were float32 of shape (1, 8, 8)"),
    ({"x": torch.zeros(1, 8, 8)}, "the inputs are a dict of x, and the model takes inputs"),
    ([], "inputs is empty"),
    (torch.zeros(0, 1, 8, 8), "inputs is empty"),
    (Image.new("L", (28, 28)), "resize=True"),
    (b"not a picture", "is not a picture that can be read"),
    ([torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)], "example 1 is float32 of shape (1, 8, 9)"),
    ([["a"]], "does not make a tensor"),
    (iter([]), "yielded no batch"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_bad_inputs_are_refused_in_one_line(learn, wrong, words):
    before = learn.fingerprint()
    for ask in (learn.predict, predictor_of(learn)):
        with pytest.raises(InputError) as error: ask(wrong)
        assert words in str(error.value) and "\n" not in str(error.value)
    assert learn.fingerprint() == before


def test_pictures_of_a_foreign_hand(tmp_path):
    with pytest.raises(FileNotFoundError): open_image(tmp_path / "none.png")
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    whole.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    for cut in (30, 100, len(data) // 2):
        with pytest.raises(InputError): open_image(data[:cut])
    (tmp_path / "link.png").symlink_to(tmp_path / "whole.png")
    with pytest.raises(ValueError, match="link"): open_image(tmp_path / "link.png")
    huge = Image.new("1", (9000, 9000))
    huge.save(tmp_path / "huge.png")
    with pytest.raises(InputError, match="pixels"): open_image(tmp_path / "huge.png")


def test_an_error_is_the_askers_and_the_next_question_is_answered(learn, images):
    ask = OpenPass(learn)
    for _ in range(3):
        with pytest.raises(TypeError): ask(torch.zeros(1, 3))
        assert ask(images[:1]).shape == (1, 10)
    cancelled = OpenPass(Learner(learn.model, None, F.cross_entropy, learn.dataloaders, [CancelsAll()]))
    for _ in range(2):
        with pytest.raises(ValueError, match="cancelled the batch"): cancelled(images[:1])


def test_a_pass_that_cannot_begin_says_so_at_each_question(learn, images):
    class Fails(Callback):
        def before_pass(self): raise ValueError("not today")
    ask = OpenPass(Learner(learn.model, None, F.cross_entropy, learn.dataloaders, [Fails()]))
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"): ask(images[:1])


def test_the_thread_ends_with_the_predictor(learn, images):
    predictor = predictor_of(learn)
    predictor(images[:1])
    thread = predictor.ask._thread
    assert thread.is_alive()
    del predictor
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    ask = OpenPass(learn)
    ask(images[:1])
    ask.close()
    with pytest.raises(ValueError, match="closed"): ask(images[:1])


def test_many_threads_get_their_own_answers(learn, images):
    predictor, wrong = predictor_of(learn), []
    expected = [predictor(images[i]).output for i in range(16)]
    def ask(number):
        for i in range(16):
            if not torch.equal(predictor(images[(i + number) % 16]).output, expected[(i + number) % 16]): wrong.append(i)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_predictor_costs_little_more_than_the_model(learn, images):
    predictor, one = predictor_of(learn), images[:1]
    model = learn.model.eval()
    def quickest(function):
        times = []
        for _ in range(60):
            begin = time.perf_counter()
            function(one)
            times.append(time.perf_counter() - begin)
        return min(times)
    with torch.no_grad(): bare = quickest(model)
    learn.model.train()
    assert quickest(predictor.ask) < 10 * bare + 1e-3  # a pass of its own takes tens of times as long


def test_losses_say_what_outputs_mean():
    scores = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    assert probabilities_of(nn.CrossEntropyLoss()) == "softmax" and probabilities_of(F.nll_loss) == "exp"
    def cross_entropy(predictions, labels): return predictions.mean()
    assert probabilities_of(cross_entropy) is None and probabilities_of(None) is None
    found = answers(scores, "softmax", ["a", "b"])
    assert found.labels == ["b", "a"] and torch.equal(found.probabilities, scores.softmax(1))
    assert torch.equal(answers(scores.log_softmax(1), "exp").probabilities, scores.log_softmax(1).exp())
    assert found[-1].label == "a" and len(found[:1]) == 1 and [one.label for one in found] == ["b", "a"]
    with pytest.raises(IndexError): found[2]
    binary = answers(torch.tensor([[-1.0], [2.0]]), "sigmoid", ["no", "yes"])
    assert binary.labels == ["no", "yes"] and binary[0].probability == pytest.approx(1 - torch.tensor(-1.0).sigmoid().item())


def test_any_function_will_do():
    predictor = Predictor(lambda batch: batch.sum(1, keepdim=True), Preparation(form_of(torch.ones(1, 3))))
    assert predictor([1, 2, 3]).output.item() == 6 and len(predictor(np.ones((5, 3)))) == 5
    read = ImageReader(3, (2, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    assert ImageReader(**read.settings()) == read
    assert read(Image.new("RGB", (2, 2), (255, 255, 0)))[:, 0, 0].tolist() == [1.0, 2.0, -0.5]
