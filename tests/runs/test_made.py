"Checkpoints that know how their parts were made: what is built again, and what no checkpoint may do."
import subprocess
import sys
from functools import partial
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.made import made, recipe_of
from learner.base.store import load_state, save_state
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.runs.cli import main
from learner.runs.made import describe, load
from learner.runs.registry import ConfigError
from learner.steer.freeze import FreezeUntil
from learner.steer.update import EMA, ClipGradients

HERE = __name__
torch.manual_seed(0)
LOADERS = {"train": [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]}


class Net(nn.Module):
    def __init__(self, width, head=None, sizes=(1, 2)):
        super().__init__()
        self.sizes, self.first, self.head = sizes, nn.Linear(4, width), head or nn.Linear(width, 3)

    def forward(self, x): return self.head(self.first(x).relu())


class Steers(Callback):
    def after_backward(self, learn): pass


class Watches(Callback):
    watches = True


class Doubled(Learner):
    def train_batch(self):
        self.act("prepare", "predict", "loss")
        self.loss = 2 * self.loss
        self.act("backward", "step")


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x): return self.first(x) + self.second(x)


def saved(tmp_path, model=None, optimiser=torch.optim.AdamW, loss=F.cross_entropy, callbacks=(), **options):
    model = made(Net, 8) if model is None else model
    learn = Learner(model, optimiser, loss, LOADERS, [*callbacks], device="cpu", **options)
    learn.train(2, learning_rate=0.01)
    learn.save(tmp_path / "it.ckpt")
    return learn, tmp_path / "it.ckpt"


@pytest.mark.parametrize("options", [
    dict(), dict(optimiser=torch.optim.SGD), dict(loss=made(nn.CrossEntropyLoss, weight=torch.tensor([1.0, 2.0, 3.0]))),
    dict(model=made(Net, 8, head=made(nn.Linear, 8, 3, bias=False), sizes=(3, (4, 5)))), dict(callbacks=[Watches(), made(EMA, 0.9)]),
    dict(callbacks=[made(ClipGradients, 0.1), made(Steers)]), dict(labels=1), dict(labels=1, inputs=0)],
    ids=lambda options: ",".join(options) or "plain")
def test_a_loaded_learner_predicts_and_goes_on_as_the_one_that_was_saved(tmp_path, options):
    learn, path = saved(tmp_path, **options)
    again = load(path, [HERE, "torch.nn.modules.linear"], dataloaders=LOADERS, device="cpu")
    x = LOADERS["train"][0][0]
    assert torch.equal(again.predict(x).outputs, learn.predict(x).outputs)
    assert recipe_of(again.model) == recipe_of(learn.model) and getattr(again.model, "sizes", None) == learn.model.sizes
    assert [type(each) for each in again.callbacks] == [type(each) for each in learn.callbacks if not isinstance(each, Watches)]
    learn.load(path)
    for each in (learn, again): each.train(4, resume=True)
    assert again.fingerprint() == learn.fingerprint()
    assert [row["train_loss"] for row in again.history.rows] == [row["train_loss"] for row in learn.history.rows]


def test_without_its_loaders_a_learner_still_predicts(tmp_path):
    learn, path = saved(tmp_path)
    again = load(path, HERE)
    x = torch.randn(5, 4)
    assert again.dataloaders == {} and torch.equal(again.predict(x).outputs, learn.predict(x).outputs)
    with pytest.raises(ValueError, match="dataloaders has no \"train\" loader"): again.train(4, resume=True)


@pytest.mark.parametrize(("options", "said"), [
    (dict(model=Net(8)), "model: the checkpoint knows only that it was a Net, which was not built by made\\(\\); give it: load\\(.*, model=...\\)"),
    (dict(loss=lambda p, y: F.cross_entropy(p, y)), "loss_func: the checkpoint knows only that it was a .*<lambda>"),
    (dict(loss=partial(F.cross_entropy, label_smoothing=0.5)), "loss_func: the checkpoint knows only that it was a partial of cross_entropy, which"),
    (dict(loss=nn.CrossEntropyLoss()), "loss_func: the checkpoint knows only that it was a CrossEntropyLoss"),
    (dict(callbacks=[Steers()]), "callbacks: Steers changes what training does, and was not built by made")])
def test_what_the_checkpoint_cannot_say_has_to_be_given(tmp_path, options, said):
    _, path = saved(tmp_path, **options)
    with pytest.raises(ConfigError, match=said): load(path, HERE)
    given = dict(model=Net(8), loss_func=F.cross_entropy, callbacks=[])
    load(path, HERE, **given)


@pytest.mark.parametrize("place", ["os:system", "builtins:eval", "torch.hub:load", "subprocess:Popen", "torch:load", "torch.nn.functional:os"])
@pytest.mark.parametrize("part", ["model", "optimiser", "loss_func", "dataloaders", "callbacks", "argument"])
@pytest.mark.parametrize("allow", [[], ["torch"], ["torch.nn"]])
def test_a_checkpoint_runs_nothing_that_is_not_allowed(tmp_path, monkeypatch, place, part, allow):
    _, path = saved(tmp_path)
    state = load_state(path)
    recipe = {"class": place, "args": [f"touch {tmp_path}/ran"], "kwargs": {}}
    if part == "argument": state["made"]["model"]["kwargs"]["head"] = {"made_by": recipe}
    elif part == "callbacks": state["made"]["callbacks"] = [recipe]
    else: state["made"][part] = recipe
    save_state(path, state)
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("it ran"))
    if part != "model": allow = [*allow, HERE]
    with pytest.raises(ConfigError) as caught: load(path, allow)
    assert "\n" not in str(caught.value)
    assert place.partition(":")[2] in describe(path) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("forged", [
    7, [], {}, {"callbacks": 7}, {"model": 7, "callbacks": []}, {"model": {"class": 3, "args": [], "kwargs": {}}, "callbacks": []},
    {"model": {"class": "no", "args": [], "kwargs": {}}, "callbacks": []}, {"model": {"class": f"{HERE}:Net", "args": 3, "kwargs": {}}, "callbacks": []},
    {"model": {"class": f"{HERE}:Net", "args": [], "kwargs": {"wide": 3}}, "callbacks": []}, {"model": {"type": ["\x1b[31m"]}, "callbacks": []},
    {"model": {"class": f"{HERE}:Net.__init__", "args": [], "kwargs": {}}, "callbacks": []}], ids=str)
def test_forged_recipes_are_refused_in_one_line(tmp_path, forged):
    _, path = saved(tmp_path)
    state = load_state(path)
    state["made"] = forged
    save_state(path, state)
    with pytest.raises(ConfigError) as caught: load(path, HERE)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in describe(path)


def test_another_process_loads_by_name_and_the_command_shows(tmp_path, capsys):
    (tmp_path / "mynets.py").write_text("from torch import nn\nclass Wide(nn.Linear):\n    def __init__(self, width): super().__init__(4, width)\n")
    script = dedent("""
        import sys
        import torch, torch.nn.functional as F
        if sys.argv[1] == "save":
            from learner.base.made import made
            from learner import Learner
            from mynets import Wide
            learn = Learner(made(Wide, width=3), torch.optim.SGD, F.cross_entropy, {"train": [(torch.ones(8, 4), torch.zeros(8).long())]}, device="cpu")
            learn.train(1, learning_rate=0.1)
            learn.save("wide.ckpt")
        else:
            from learner.runs.made import load
            learn = load("wide.ckpt", allow=["mynets"])
        print(learn.predict(torch.ones(1, 4)).outputs.tolist())
    """)
    (tmp_path / "it.py").write_text(script)
    said = [subprocess.run([sys.executable, "it.py", word], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            for word in ("save", "load")]
    assert said[0] == said[1]
    assert main(["show", str(tmp_path / "wide.ckpt")]) == 0
    out = capsys.readouterr().out
    assert "mynets:Wide(width=3)" in out and "torch.optim.sgd:SGD" in out and "train_loss" in out and "mynets" not in sys.modules


def test_made_refuses_what_another_process_would_not_find():
    class Local(nn.Module): pass
    with pytest.raises(TypeError, match="define it at the top of a module"): made(Local)
    with pytest.raises(TypeError, match=r"made\(Net\): width is <object"): made(Net, width=object())
    with pytest.raises(TypeError, match=r"made\(Net\): sizes\[1\] is Linear"): made(Net, 3, sizes=[1, nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="takes no attribute"): made(dict, a=1)


@pytest.mark.parametrize("local", [False, True])
def test_a_checkpoint_of_a_subclass_wants_the_class(tmp_path, local):
    class Local(Doubled): pass
    kind = Local if local else Doubled
    def one(kind): return kind(made(Net, 8), torch.optim.SGD, F.cross_entropy, LOADERS, device="cpu")
    torch.manual_seed(0)
    learn = one(kind)
    learn.train(1, learning_rate=0.1)
    path = tmp_path / "c"
    learn.save(path)
    with pytest.raises(ConfigError, match=rf"^learner: the checkpoint is of a .*{kind.__name__}, which may train .*learner=\.\.\.\)$"): load(path, HERE)
    again = load(path, HERE, learner=kind, dataloaders=LOADERS, device="cpu")
    for each in (learn, again): each.train(2, resume=path)
    assert type(again) is kind and again.fingerprint() == learn.fingerprint()
    assert kind.__name__ in describe(path)
    for wrong in (nn.Linear, learn):
        with pytest.raises(TypeError, match="pass a subclass of Learner"): load(path, HERE, learner=wrong)
    plain = one(Learner)
    plain.save(path)
    assert type(load(path, HERE)) is Learner


def test_a_checkpoint_from_before_classes_and_frozen_parameters_were_noted_is_loaded(tmp_path):
    learn, path = saved(tmp_path)
    state = load_state(path)
    del state["made"]["learner"], state["made"]["frozen"]
    save_state(path, state)
    again = load(path, HERE)
    assert type(again) is Learner and torch.equal(again.model.head.weight, learn.model.head.weight)


@pytest.mark.parametrize(("entry", "said"), [(dict(frozen=7), "which parameters were frozen"), (dict(frozen=[3]), "which parameters were frozen"), (dict(learner=7), "^learner: the checkpoint is of a 7, ")])
def test_forged_classes_and_frozen_parameters_are_refused(tmp_path, entry, said):
    _, path = saved(tmp_path)
    state = load_state(path)
    state["made"].update(entry)
    save_state(path, state)
    with pytest.raises(ConfigError, match=said): load(path, HERE)


def only_trainable(parameters, lr): return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=lr)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, only_trainable], ids=["all", "those that ask for gradients"])
def test_frozen_parameters_stay_frozen(tmp_path, optimiser):
    model = made(Net, 8)
    model.first.bias.requires_grad_(False)
    learn = Learner(model, optimiser, F.cross_entropy, LOADERS, device="cpu")
    learn.train(1, learning_rate=0.1)
    learn.save(tmp_path / "c")
    again = load(tmp_path / "c", HERE, optimiser=optimiser, dataloaders=LOADERS, device="cpu")
    assert [p.requires_grad for p in again.model.parameters()] == [True, False, True, True]
    for each in (learn, again): each.train(1)
    assert all(map(torch.equal, again.model.parameters(), learn.model.parameters()))
    assert again.fingerprint()["optimiser"] == learn.fingerprint()["optimiser"]


def test_what_a_callback_froze_when_the_checkpoint_was_written_is_trained_later(tmp_path):
    def one(): return Learner(made(Net, 8), torch.optim.SGD, F.cross_entropy, LOADERS, [made(FreezeUntil, 2, "first")], device="cpu")
    torch.manual_seed(0)
    learn = one()
    learn.model.head.bias.requires_grad_(False)
    learn.on("after_batch", lambda learn, epoch, batch_num: learn.save(tmp_path / "c") if (epoch, batch_num) == (1, 1) else None)
    learn.train(4, learning_rate=0.1)
    again = load(tmp_path / "c", [HERE, "learner.steer.freeze"], callbacks=[FreezeUntil(2, "first")], dataloaders=LOADERS, device="cpu")
    assert [p.requires_grad for p in again.model.parameters()] == [True, True, True, False]
    again.train(4, resume=True)
    assert all(map(torch.equal, again.model.parameters(), learn.model.parameters()))
    assert [p.requires_grad for p in again.model.parameters()] == [True, True, True, False]


def test_the_same_part_given_twice_is_refused():
    part = made(nn.Linear, 4, 3)
    said = r"^made\(Two\): the same Linear is given twice, and loading would build two of them; .*$"
    with pytest.raises(ValueError, match=said): made(Two, part, part)
    with pytest.raises(ValueError, match=said): made(Two, part, second=made(Two, made(nn.Linear, 4, 3), part))
    with pytest.raises(ValueError, match="Net.*given twice"): made(nn.ModuleList, [(net := made(Net, 2)), net])
    made(Two, part, made(nn.Linear, 4, 3))  # equal parts are two parts
