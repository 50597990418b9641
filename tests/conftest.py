"""The long forms of tests, and those that need a GPU: `pytest --long`, which is what `make test-long` runs."""
import gc
import os
import signal

import pytest


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms too: every batch, hundreds of kills")


def pytest_configure(config):
    # The nets are too small to share out, and what processes give is compared. Processes that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    if config.getoption("--long"): os.environ["LEARNER_LONG"] = "1"
    # A shell that starts a job in the background has Ctrl-C ignored in it; the tests press it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def elsewhere():
    """Makes tensors that say that they are on an accelerator, where one has to wait for a value."""
    import torch

    class Elsewhere(torch.Tensor):
        is_cpu = False

    return lambda value: torch.as_tensor(value).as_subclass(Elsewhere)


@pytest.fixture
def waits(monkeypatch):
    """A list to which whatever reads a value from an accelerator, real or pretended, adds the name of the method."""
    import torch
    found = []

    def watch(name):
        plain = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            if not self.is_cpu: found.append(name)
            with torch._C.DisableTorchFunctionSubclass(): return plain(self, *args, **kwargs)  # or it would come here again
        monkeypatch.setattr(torch.Tensor, name, method)

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"): watch(name)
    return found


def pytest_collection_finish():
    # A learner collects garbage after a failed training, and thousands of those are tested: half a million objects of
    # the packages that are loaded by now need not be looked at each time.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    import torch
    long, gpu = os.environ.get("LEARNER_LONG") == "1", torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("long") and not long: item.add_marker(pytest.mark.skip(reason="long: make test-long runs it"))
        if item.get_closest_marker("gpu") and not gpu: item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))
