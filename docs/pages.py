"""What the package has: its public names, the page of each, and the classes of its errors."""

import inspect
import pkgutil
from functools import cache
from importlib import import_module

import learner.all
from learner.loop.stages import KINDS, TREE


@cache
def modules():
    "The modules that have public names, by their names without `learner.`."
    found = {}
    for info in pkgutil.walk_packages(learner.__path__, "learner."):
        short = info.name.removeprefix("learner.")
        if short.startswith("_") or info.ispkg or "." not in short:
            continue
        module = import_module(info.name)
        if public(module):
            found[short] = module
    return found


def public(module):
    "The public names of a module that are defined in it."
    return [name for name in getattr(module, "__all__", ()) if not name.startswith("_")]


def main_names():
    "The names that `from learner import *` gives, with their values."
    return {name: getattr(learner.all, name) for name in learner.all.__all__}


def _exceptions():
    "Every public exception that is defined in the package, with its module."
    for short, module in modules().items():
        for name in public(module):
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, Exception):
                yield name, value, f"learner.{short}"


@cache
def errors():
    "The public classes of errors, with the module of each."
    kinds = (ValueError, TypeError, LookupError, ArithmeticError, OSError, RuntimeError)
    return {name: module for name, value, module in _exceptions() if issubclass(value, kinds)}


def cancelling():
    "The exceptions that end a stage early."
    return {name: value for name, value, _ in _exceptions() if name.startswith("Cancel")}


@cache
def names_and_places():
    "The page of each public name, for links; of a name that two modules have there is none."
    found, twice = {}, set()
    for short, module in modules().items():
        for name in public(module):
            if name in found:
                twice.add(name)
            if not name[:1].isupper() and "_" not in name:
                continue  # `split` may well be another word
            found[name] = f"reference/modules/{short}#{name.lower().replace('_', '-')}"
        found[f"learner.{short}"] = f"reference/modules/{short}"
    for name in twice:
        found.pop(name, None)
    for stage in TREE.stages:
        section = f"reference/hooks#{stage.replace('_', '-')}"
        found |= {f"{kind}_{stage}": section for kind in KINDS}
    for name in main_names():
        found[name] = f"reference/{name}"
    for name in errors():
        found[name] = f"reference/errors#{name.lower()}"
    return found
