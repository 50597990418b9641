"""What is exported computes what was trained, alterations are found, and nothing of a folder is executed."""
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from io import BytesIO

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.store import load_state, save_state
from learner.base.words import format_value
from learner.loop.data import TensorLoader
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.runs.cli import main
from learner.runs.runfiles import read_run
from learner.runs.runs import evaluate_run, resume_run, train_run
from learner.steer.augment import TTA, BatchTransform, normalise
from learner.steer.update import EMA
from learner.use.export import ExportError, export, export_run, verify
from learner.use.folder import FILES, Exported, check_hashes
from learner.use.hub import load_weights, read_weights
from learner.use.program import ProgramError, check_program, run_program

LONG = pytest.mark.long


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 10)
    def forward(self, x):
        x = self.first(x).relu()
        return self.head((x + self.norm(self.conv(x)).relu()).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 10)
    def forward(self, x): return self.head(self.body(self.embed(x[:, 0])).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(8, 12, batch_first=True), nn.Linear(12, 10)
    def forward(self, x): return self.head(self.body(x[:, 0])[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(10, 64), nn.Linear(64, 10)
        self.head.weight = nn.Parameter(torch.randn(10, 64))
        self.embed.weight = nn.Parameter(self.head.weight.T.detach().clone())
        self.again = self.head
    def forward(self, x): return self.again(self.embed(self.head(x.flatten(1))))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
    def forward(self, x):
        scores = self.head(x.flatten(1))
        return {"scores": scores, "both": (scores * 2, scores.argmax(1))}


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(72, 10))

def dense(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10))

def separable():
    return nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

def up_and_down():
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.ConvTranspose2d(4, 2, 2, 2),
                         nn.InstanceNorm2d(2, affine=True), nn.Flatten(), nn.LazyLinear(10))

ARCHITECTURES = {"convolutional": convolutional, "dense": dense, "attention": Attention,
                 "residual": Residual, "lstm": lambda: Recurrent(nn.LSTM), "gru": lambda: Recurrent(nn.GRU), "tied": Tied, "two outputs": Two,
                 "separable": separable, "up and down": up_and_down}


def learner_of(model, callbacks=(), train=True):
    torch.manual_seed(0)
    learn = Learner(model(), torch.optim.AdamW, F.cross_entropy, digits(), callbacks)
    if train: learn.train(1, learning_rate=0.01, test=False)
    return learn


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    learn = learner_of(convolutional, [BatchTransform(normalise(0.3, 0.4), phases=("train", "validation", "test")), EMA(0.9)])
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(learn, folder, onnx=True)
    return learn, folder


@pytest.fixture
def copy(exported, tmp_path): return shutil.copytree(exported[1], tmp_path / "copy")


@pytest.mark.parametrize("name", [name if i < 3 else pytest.param(name, marks=LONG) for i, name in enumerate(ARCHITECTURES)])
def test_an_architecture_through_export_and_verify(name, tmp_path):
    learn = learner_of(ARCHITECTURES[name], train=name != "two outputs")
    found = export(learn, tmp_path / "model", onnx=True)
    assert found.ok and found.differences["program.json"] < 1e-6 and found.differences["model.onnx"] < 1e-4
    images = next(iter(learn.dataloaders["test"]))[0]
    model = Exported(tmp_path / "model")
    for rows in (1, 3, len(images)):
        ours, theirs = (each if isinstance(each, torch.Tensor) else each["both"][0]
                        for each in (learn.predict(images[:rows]).outputs, model.predictor(images[:rows]).outputs))
        assert torch.allclose(ours, theirs, atol=1e-5)
    print(name, found.differences)


def test_all_that_steers_is_in_the_program(exported):
    learn, folder = exported
    images = next(iter(learn.dataloaders["test"]))[0]
    ours, theirs = learn.predict(images), Exported(folder).predictor(images)
    assert torch.equal(ours.outputs, theirs.outputs) and ours.labels == theirs.labels
    assert not torch.allclose(learn.model.eval()(images), ours.outputs)  # neither mean nor average
    learn.add(views := TTA([lambda x: x.roll(1, -1)]))
    try:
        assert export(learn, folder.parent / "views").ok
        assert torch.equal(Exported(folder.parent / "views").predictor(images).outputs, learn.predict(images).outputs)
    finally: learn.remove(views)


def test_exporting_leaves_the_learner_as_it_was(exported, tmp_path):
    learn, _ = exported
    before, modes = learn.fingerprint(), [module.training for module in learn.model.modules()]
    random_state = torch.get_rng_state()
    export(learn, tmp_path / "model")
    assert learn.fingerprint() == before and modes == [module.training for module in learn.model.modules()]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_pictures_and_classes_go_along(exported):
    from PIL import Image
    learn, folder = exported
    images = next(iter(learn.dataloaders["test"]))[0]
    picture = Image.fromarray((images[0, 0] * 255).round().byte().numpy())
    assert torch.equal(Exported(folder).predictor(picture).output, learn.predict(picture).output)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["3"] == "3" and config["probabilities"] == "softmax" and config["architectures"] == ["Sequential"]


def test_the_card_says_where_the_model_comes_from(tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "model"
    assert main(["train", "digits", str(run), "--epochs=1", "--model.width=4", "--quiet"]) == 0
    assert main(["evaluate", str(run), "--split=test"]) == 0
    assert main(["export", str(run), str(folder)]) == main(["verify", str(folder)]) == 0
    capsys.readouterr()
    assert main(["verify", str(run)]) == 2
    assert capsys.readouterr().err == f"learner verify: {run} is a run; export it first: learner export {run} FOLDER\n"
    card, meta = (folder / "README.md").read_text(), json.loads((run / "meta.json").read_text())
    for text in (meta["data"]["train"], meta["data"]["validation"], meta["git"]["commit"], "width: 4", "test_accuracy", "## Limits",
                 f"learner export {run} {folder} --checkpoint=best", "program.json", "float32 of shape (1, 8, 8)"):
        assert str(text) in card
    assert all((f"| {name} |" in card) == (folder / name).exists() for name in FILES)


def test_the_card_has_the_scores_of_the_checkpoint_and_of_no_other(tmp_path):
    run = tmp_path / "run"
    train_run("digits", run, {"model.width": 4, "epochs": 2}, plots=False)
    resume_run(run, epochs=3)
    for checkpoint, changes in (("epoch-0002", None), ("epoch-0003", None), ("epoch-0002", {"model.dropout": 0.9, "batch_size": 7})):
        evaluate_run(run, "test", checkpoint, overrides=changes)
    rows, meta = read_run(run).rows, read_run(run).meta
    first, second, _ = meta["evaluations"]
    assert first["results"] != second["results"]
    export_run(run, tmp_path / "model", "epoch-0002")
    text = (tmp_path / "model/README.md").read_text()
    for name in ("train_loss", "train_accuracy", "validation_loss"): assert f"| {name} | {format_value(rows[1][name])} |" in text
    assert f"| test_loss | {format_value(first['results']['test_loss'])} |" in text and "Of checkpoint epoch-0002:" in text
    assert "Training was resumed once, up to 3 epochs in all." in text
    assert "program.pt2" in text and "model.onnx" not in text  # the files that are there, and no others
    listed = set(re.findall(r"^\| ([\w.]+\.\w+) \|", text, re.M))
    assert listed >= {path.name for path in (tmp_path / "model").iterdir()}


def test_verifying_does_without_training_code(exported):
    code = (f"import sys; from learner.use.folder import verify; assert verify({str(exported[1])!r}).ok\n"
            "print(sorted(name for name in sys.modules if name.startswith('learner.')))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = eval(out)  # a list that this test has printed
    assert names and not [name for name in names if name.split(".")[1] not in ("base", "use")]
    assert not {"learner.use.export", "learner.use.predict"} & set(names)


def damages(folder, number):
    "Do one of many kinds of damage to a folder, and say what."
    draw = random.Random(number)
    names = sorted(os.listdir(folder))
    name = draw.choice(names)
    path, kind = folder / name, draw.choice(["flip", "flip", "flip", "cut", "grow", "lose", "add", "swap", "link", "weight"])
    data = bytearray(path.read_bytes())
    if kind == "flip": data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut": del data[draw.randrange(len(data)):]
    elif kind == "grow": data += b" "
    elif kind == "lose": return path.unlink() or f"{kind} {name}"
    elif kind == "add": return (folder / "extra.bin").write_bytes(b"x") and f"{kind} {name}"
    elif kind == "swap": data = bytearray((folder / names[names.index(name) - 1]).read_bytes())
    elif kind == "link":
        path.rename(folder.parent / "elsewhere")
        path.symlink_to(folder.parent / "elsewhere")
        return f"{kind} {name}"
    else:
        weights = load_state(folder / "model.safetensors")
        first = draw.choice(sorted(weights))
        weights[first] = weights[first] + 1 if weights[first].numel() else weights[first]
        save_state(folder / "model.safetensors", weights)
        return f"{kind} {first}"
    path.write_bytes(data)
    return f"{kind} {name}"


def test_two_hundred_altered_folders_are_all_found(exported, tmp_path):
    for number in range(200):
        folder = shutil.copytree(exported[1], tmp_path / str(number) / "model")
        what = damages(folder, number)
        with pytest.raises(ExportError):
            check_hashes(folder)
            pytest.fail(f"not found: {what}")
        shutil.rmtree(tmp_path / str(number))
    check_hashes(exported[1])


def rehash(folder):
    "What a forger does: hashes that fit."
    from learner.base.files import write_json
    from learner.use.folder import _hashes
    write_json(folder / "hashes.json", _hashes(folder))


def test_a_weight_that_was_changed_with_its_hash_is_found_by_the_answers(copy):
    weights = load_state(copy / "model.safetensors")
    weights["0.weight"][0, 0, 0, 0] += 0.5
    save_state(copy / "model.safetensors", weights)
    rehash(copy)
    found = verify(copy)
    assert not found.ok and found.differences["program.json"] > 1e-3 and found.differences["model.onnx"] < 1e-4
    assert main(["verify", str(copy)]) == 2


def test_a_preparation_that_was_changed_with_its_hash_is_found(copy):
    config = json.loads((copy / "config.json").read_text())
    config["image"]["mean"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    rehash(copy)
    assert not verify(copy).ok


class Bomb:
    def __reduce__(self): return os.system, ("touch owned",)


EVIL = pickle.dumps(Bomb())
def pickled():
    file = BytesIO()
    torch.save({"x": Bomb()}, file)
    return file.getvalue()


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("evil", [EVIL, pickled(), b"import os; os.system('touch owned')", b"\x80\x04."], ids=["pickle", "torch", "python", "end"])
def test_nothing_of_a_malicious_file_is_executed(copy, name, evil, monkeypatch):
    monkeypatch.chdir(copy.parent)
    (copy / name).write_bytes(evil)
    if name != "hashes.json": rehash(copy)
    try: verify(copy)
    except Exception as error: assert name in ("model.onnx",) or isinstance(error, ValueError), error
    assert not (copy.parent / "owned").exists() and not (copy / "owned").exists()


@pytest.mark.parametrize("op", ["os.system", "torch.os.system", "builtins.exec", "python.eval", "python.__import__", "aten.from_file.default",
                                "aten.__class__.default", "prims.foo.default", "aten.relu", "", None, 3, "aten.relu.default.__call__"])
def test_a_program_cannot_name_anything_but_operators(copy, op, monkeypatch):
    monkeypatch.chdir(copy.parent)
    program = json.loads((copy / "program.json").read_text())
    program["steps"][0] |= {"op": op, "args": ["touch owned"], "kwargs": {}}
    with pytest.raises(ProgramError): check_program(program)
    (copy / "program.json").write_text(json.dumps(program))
    rehash(copy)
    with pytest.raises(ExportError): verify(copy)
    assert not (copy.parent / "owned").exists()


@pytest.mark.parametrize("change", [
    lambda config: config["inputs"][0].update(dtype="hub"), lambda config: config["inputs"][0].update(shape=[-1]),
    lambda config: config["inputs"][0].update(shape="x"), lambda config: config.pop("inputs"),
    lambda config: config.update(structure={"eval": "1"}), lambda config: config.update(image={"evil": 1}),
    lambda config: config.update(image={"channels": 7, "size": [8, 8]}), lambda config: config.update(classes=3),
    lambda config: config.update(probabilities="os.system"), lambda config: config.update(outputs=[1]),
    lambda config: config.update(format="other"), lambda config: config.update(inputs=[])])
def test_a_config_that_makes_no_sense_is_refused_in_one_line(copy, change):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    rehash(copy)
    with pytest.raises(ExportError) as error: verify(copy)
    assert "\n" not in str(error.value)


def test_columns_are_kept_and_refused_where_they_do_not_belong_to_the_inputs(tmp_path):
    rows = torch.tensor([[0.0, 7.0], [1.0, 7.0], [1.0, 9.0]])
    folder = tmp_path / "model"
    export(Learner(nn.Linear(2, 2), None, F.cross_entropy, {"validation": [(rows, torch.zeros(3, dtype=torch.long))]}), folder, columns=["dose", "weight"])
    columns = Exported(folder).predictor.preparation.columns
    assert columns.names == ("dose", "weight") and columns.typical.tolist() == [1.0, 7.0]
    good = (folder / "config.json").read_text()
    for change in ({"columns": ["dose"]}, {"columns": ["dose", 3]}, {"columns": 3}, {"typical": [1.0]}, {"typical": ["a", "b"]}, {"typical": [1e300, 1.0]},
                   {"typical": [[1.0, 2.0]]}, {"typical": None}):
        config = json.loads(good)
        config["inputs"][0].update(change)
        (folder / "config.json").write_text(json.dumps(config))
        rehash(folder)
        with pytest.raises(ExportError, match="columns that do not belong to its inputs") as caught: Exported(folder)
        assert "\n" not in str(caught.value)



def test_loading_nothing_is_unpickled(copy, monkeypatch):
    def refuse(*_, **__): raise AssertionError("something was unpickled")
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch.export, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert verify(copy).ok and Exported(copy).predictor(torch.zeros(1, 8, 8)).label is not None


class Deciding(nn.Linear):
    def forward(self, x):
        if x.sum() > 0: return super().forward(x.flatten(1))
        return -super().forward(x.flatten(1))


class Fixed(nn.Linear):
    def forward(self, x): return super().forward(x.reshape(2, 64) if x.shape[0] == 2 else x.flatten(1))


class Random(nn.Linear):
    def forward(self, x): return super().forward(x.flatten(1)) + torch.randn(10)


class Outside(nn.Linear):
    def forward(self, x): return torch.from_numpy(super().forward(x.flatten(1)).detach().numpy() + 1)


@pytest.mark.parametrize("kind, words", [(Deciding, ["test_export.py", "if x.sum() > 0", "by the values of a tensor"]),
                                         (Fixed, ["test_export.py", "fixed number"]), (Outside, ["test_export.py", "numpy"]),
                                         (Random, ["random numbers"])])
def test_a_model_that_cannot_be_exported_says_which_line_stops_it(kind, words, tmp_path):
    learn = Learner(kind(64, 10), None, F.cross_entropy, digits())
    before = learn.fingerprint()
    with pytest.raises(ExportError) as error: export(learn, tmp_path / "model")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists() and learn.fingerprint() == before


def test_several_inputs_keep_their_names(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
        def forward(self, x, scale): return self.linear(x) * scale[:, None]
    data = {"x": torch.randn(20, 3), "scale": torch.rand(20), "labels": torch.arange(20) % 2}
    learn = Learner(Net(), None, F.cross_entropy, {"validation": TensorLoader(data)})
    assert export(learn, tmp_path / "model").ok
    question = {"x": data["x"][0], "scale": data["scale"][0]}
    assert torch.equal(Exported(tmp_path / "model").predictor(question).output, learn.predict(question).output)
    slots = json.loads((tmp_path / "model/config.json").read_text())["inputs"]
    assert [slot["name"] for slot in slots] == ["x", "scale"]


def test_a_callback_that_cannot_be_followed_is_found_by_the_answers(tmp_path):
    class Counting(Callback):
        def __init__(self): self.count = 0.0
        def after_predict(self, learn):
            self.count += 1
            learn.predictions = learn.predictions + self.count
    learn = learner_of(dense, [Counting()])
    with pytest.raises(ExportError, match="keep a state"): export(learn, tmp_path / "model")


def test_folders_that_are_not_for_a_model_are_left_alone(exported, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="thesis.tex"): export(exported[0], tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(FileNotFoundError): verify(tmp_path / "none")
    with pytest.raises(ExportError, match="hashes.json"): verify(tmp_path)


def test_weights_go_to_and_from_the_layout_of_hugging_face(exported, tmp_path):
    from safetensors.torch import load_file, save_file
    learn, folder = exported
    theirs = load_file(folder / "model.safetensors")
    assert set(theirs) == set(learn.model.state_dict())
    model = convolutional()
    load_weights(model, folder)
    assert torch.equal(model.state_dict()["0.weight"], theirs["0.weight"])
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(theirs)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, some in parts.items(): save_file({name: theirs[name] for name in some}, sharded / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read_weights(sharded).items())
    index["weight_map"]["0.weight"] = "../exported/model.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError): read_weights(sharded)
    with pytest.raises(ValueError, match="1.weight has shape"): load_weights(dense(), folder)


def test_a_program_runs_on_what_it_is_given(exported):
    model = Exported(exported[1])
    with pytest.raises(ProgramError, match="2 inputs|inputs, not"): run_program(model.program, model.weights, [])
    with pytest.raises(ProgramError, match="weights have no"): run_program(model.program, {}, [torch.zeros(1, 1, 8, 8)])
