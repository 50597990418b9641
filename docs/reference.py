"""The pages of the reference, made of what the package says of itself."""

import inspect
import re
from contextlib import redirect_stdout
from io import StringIO

from docstrings import escaped, markdown, purpose, signature
from errors import errors_page
from notebooks import FOLDERS
from pages import main_names, modules, public

from learner import Learner
from learner.loop.learner import HIDDEN_FROM_TAB
from learner.loop.stages import KINDS, TREE
from learner.runs import cli

FIXTURES = {
    "batch": "the batch as the loader gave it, on the device once it is prepared",
    "batch_num": "the number of the batch in its pass, from 0",
    "batch_size": "how many examples the batch has, its weight in every mean",
    "data": "what the model gets of the batch",
    "epoch": "the number of the epoch, from 0",
    "labels": "what the loss compares the predictions with, or None",
    "loss": "the loss of the batch, a tensor without dimensions",
    "num_epochs": "how many epochs the training has",
    "phase": "which pass it is: `train`, `validation` or `test`",
    "predictions": "what the model gave",
}

_HEAD = "`from learner import {name}`, from [`{module}`](modules/{short}.md)"


def methods(cls):
    "The public methods and properties of a class that have a docstring, by name."
    plain = {*dir(Exception), *dir(dict), *dir(list)}
    for name in sorted({*dir(cls)} - plain):
        if name.startswith("_"):
            continue
        static = inspect.getattr_static(cls, name)
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if not owner.__module__.startswith("learner"):
            continue
        value = getattr(cls, name, None)
        doc = inspect.getdoc(static if isinstance(static, property) else value)
        if doc and (isinstance(static, property) or callable(value)):
            yield name, static, value


def entry(name, value, level, inherited=True):
    "A function or a class with its methods, as Markdown."
    doc = inspect.getdoc(value) or ""
    if not getattr(value, "__module__", "learner").startswith("learner"):
        return f"```python\n{signature(name, value)}\n```\n\n```text\n{doc}\n```"
    if not callable(value):
        return f"```text\n{name} = {short_repr(value)}\n```"
    parts = [f"```python\n{signature(name, value)}\n```", markdown(doc, value)]
    if inspect.isclass(value):
        inner = HIDDEN_FROM_TAB if value is Learner else ()  # comes last
        below = level + 1
        for method, static, bound in sorted(methods(value), key=lambda each: each[0] in inner):
            if not inherited and method not in vars(value):
                continue
            if method in inner and below == level + 1:
                parts.append(f"{'#' * below} What callbacks and subclasses use")
                below += 1
            parts.append(f"{'#' * below} {name}.{method}")
            if isinstance(static, property):
                parts += [markdown(inspect.getdoc(static))]
            else:
                parts += [
                    f"```python\n{signature(method, bound)}\n```",
                    markdown(inspect.getdoc(bound), bound),
                ]
    return "\n\n".join(filter(None, parts))


def short_repr(value):
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= 300 else f"{text[:300]} ..."


def name_page(name, value):
    "The page of one of the main names."
    short = next(
        (
            short
            for short, module in modules().items()
            if name in public(module) and getattr(module, name) is value
        ),
        "watch.metrics",
    )
    head = _HEAD.format(name=name, module=f"learner.{short}", short=short)
    return "\n\n".join([f"# {name}", head, entry(name, value, 1)])


def module_page(short, module):
    "The page of a module: its public names, those that have a page of their own as a link."
    folder, _, name = short.partition(".")
    doc = (module.__doc__ or "").strip()
    parts = [
        f"# learner.{short}",
        escaped(doc),
        f"The notebook that makes it explains it: [{short}](/nbs/{folder}/{name}.ipynb).",
    ]
    main = main_names()
    for name in public(module):
        value = getattr(module, name)
        parts.append(f"## {name}")
        if name in main:
            parts.append(f"{escaped(purpose(value))} [All of it](/reference/{name}.md)")
        else:
            parts.append(entry(name, value, 2, inherited=False))
    return "\n\n".join(parts)


def index_page():
    "The overview: the main names by folder, and all modules."
    places, parts = main_names(), ["# Reference"]
    parts += [
        "Fifty names come with `from learner import ...`; all else is reached by its module, as in "
        "`from learner import augment`. "
        'The reference is also one file: <a href="../learner.md">learner.md</a>.'
    ]
    for folder, about in FOLDERS.items():
        rows = []
        for short, module in modules().items():
            if not short.startswith(f"{folder}."):
                continue
            rows += [
                (name, purpose(getattr(module, name)))
                for name in public(module)
                if places.get(name) is getattr(module, name)
            ]
        if rows:
            parts += [
                f"## {folder}: {about}",
                *(f"[{name}]({name}.md)\n: {escaped(text)}" for name, text in sorted(rows)),
            ]
    parts += ["`MulticlassAccuracy` is torcheval's: [MulticlassAccuracy](MulticlassAccuracy.md)."]
    more = ["hooks", "errors", "command_line", "run_folder", "modules/index"]
    return "\n\n".join([*parts, toctree([*more, *sorted(places)])])


def toctree(pages, hidden=True):
    return "\n".join(["```{toctree}", *[":hidden:"] * hidden, ":maxdepth: 1", "", *pages, "```"])


def modules_page():
    parts = [
        "# Modules",
        "The public names of every module. A module imports only from its own folder "
        "and from those above it.",
    ]
    for folder, about in FOLDERS.items():
        inside = {
            short: module for short, module in modules().items() if short.startswith(f"{folder}.")
        }
        if not inside:
            continue
        parts += [f"## {folder}", about[0].upper() + about[1:] + "."]
        parts += [
            f"[{short}]({short}.md)\n: {escaped((module.__doc__ or '').strip())}"
            for short, module in inside.items()
        ]
    return "\n\n".join([*parts, toctree(sorted(modules()))])


def stage_section(stage, depth):
    "What a stage is, and what its hooks may ask for."
    tree = TREE
    about = [f"{stage.about[0].upper()}{stage.about[1:]}."]
    if stage.inside:
        about.append(f"Opens in {' or '.join(f'`{name}`' for name in stage.inside)}.")
    if stage.cancel:
        about.append(f"`{stage.cancel.__name__}` ends it early.")
    if stage.group:
        about.append(f"Belongs to the group `{stage.group}`.")
    if stage.name in tree.actions:
        about.append(f"A callback's method `{stage.name}` replaces the learner's own.")
    rows = []
    for kind in KINDS:
        sure, some = tree.alive("before" if kind == "around" else kind, stage.name)
        perhaps = f"; perhaps {ticked(some - sure)}" if some - sure else ""
        rows.append(f"`{kind}_{stage.name}`\n: {ticked(sure) or 'nothing of its own'}{perhaps}")
    return "\n\n".join([f"### {stage.name}", " ".join(about), *rows])


def ticked(names):
    return ", ".join(f"`{name}`" for name in sorted(names))


def hooks_page():
    "All hooks and fixtures, from the table of stages."
    outline = "\n".join(
        f"{'  ' * depth + stage.name:26}{stage.about}" for depth, stage in TREE.outline()
    )
    kinds = {
        "before_X": "when X opens",
        "around_X": "a generator that yields once, where X runs",
        "after_X": "when X has completed",
        "cancelled_X": "instead of `after_X`, if an exception inside has ended X early",
        "cleanup_X": "last, whatever has happened; all are called, even if one raises",
    }
    seen, stages = set(), []
    for depth, stage in TREE.outline():
        if stage.name not in seen:
            stages.append(stage_section(stage, depth))
        seen.add(stage.name)
    groups = [f"`{group}`\n: {ticked(members)}" for group, members in TREE.groups.items()]
    lives = [
        f"`{name}`\n: {FIXTURES[name]}; {escaped(TREE.lifetime(name))}"
        for name in sorted(TREE.fixtures())
    ]
    return "\n\n".join(
        [
            "# Hooks and fixtures",
            "A method of a [Callback](Callback.md) with the name of a hook is called there. Its "
            "parameters say what it wants: `learn` is the learner, any other name a fixture, a "
            "value that exists at that moment.",
            "## The stages",
            f"```text\n{outline}\n```",
            "## The kinds of hooks",
            *(f"`{name}`\n: {text}" for name, text in kinds.items()),
            "Within each kind, callbacks run by `priority`, lowest first, and ties in the order "
            "in which they were added. A hook that names "
            "a group, such as `before_pass`, is called for each stage of the group.",
            "## Groups",
            *groups,
            "## Fixtures",
            f"Always there: `learn` and {ticked(Learner.fixtures)}. A fixture that may be absent "
            "needs a default, as "
            "in `def cleanup_batch(self, loss=None)`.",
            *lives,
            "## Hook by hook",
            "Each hook lists the fixtures that it may ask for. The bare name of an action "
            "is a hook too: "
            f"{', '.join(f'`{name}`' for name in TREE.actions)}.",
            *stages,
        ]
    )


def said(*words):
    "What the command line prints."
    with redirect_stdout(StringIO()) as out:
        cli.main(words)
    return out.getvalue().rstrip()


def command_line_page():
    "The help of every command, as the program prints it."
    overview = said("--help")
    commands = re.findall(r"^  (\w+) +\S", overview, re.MULTILINE)
    parts = [
        "# Command line",
        "What `learner --help` prints, and the help of each command.",
        f"```text\n{overview}\n```",
    ]
    for command in commands:
        parts += [f"## learner {command}", f"```text\n{said(command, '--help')}\n```"]
    return "\n\n".join(
        [
            *parts,
            "## The settings of a config",
            "The config that comes with the package, as an example: `learner train digits --help`.",
            f"```text\n{said('train', 'digits', '--help')}\n```",
        ]
    )


def single_file(texts):
    "The reference as one Markdown file, without the links between pages."
    text = "\n\n".join(
        re.sub(r"```\{toctree\}.*?```", "", text, flags=re.DOTALL).strip() for text in texts
    )
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def write_reference(keep, run_folder):
    "All pages; returns them as one file, and a line for each main name."
    pages = {
        "hooks": hooks_page(),
        "errors": errors_page(),
        "command_line": command_line_page(),
        "index": index_page(),
        "modules/index": modules_page(),
    }
    names = {name: name_page(name, value) for name, value in main_names().items()}
    inside = {f"modules/{short}": module_page(short, module) for short, module in modules().items()}
    for name, text in {**pages, **names, **inside}.items():
        keep(f"reference/{name}.md", text + "\n")
    whole = [
        "# learner: the reference in one file",
        pages["hooks"],
        *names.values(),
        pages["errors"],
        pages["command_line"],
        run_folder,
        *inside.values(),
    ]
    return single_file(whole), {name: purpose(value) for name, value in main_names().items()}
