"""The checks by name: handed on lazily, and what `from learner import check` gives."""
import subprocess
import sys

import pytest

from learner import check
from learner.check import checks, survey


def test_each_check_is_reached_by_the_name_of_the_folder():
    assert check.gradient_flow is checks.gradient_flow and check.data is survey.data
    assert all(callable(getattr(check, name)) for name in check.__all__) and set(check.__all__) <= set(dir(check))
    assert {"batch_leakage", "initial_loss", "overfit_one_batch", "doctor", "check_callback", "NaNGuard"} <= set(check.__all__)


def test_no_module_of_the_folder_has_the_name_of_a_check():
    from pathlib import Path
    modules = {path.stem for path in Path(check.__file__).parent.glob("*.py")}
    assert not modules & set(check.__all__)  # importing it would hide the check


def test_a_name_that_is_not_there_gets_a_hint():
    with pytest.raises(AttributeError, match="module learner.check has no attribute gradients_flow; did you mean gradient_flow"):
        check.gradients_flow  # noqa: B018


def test_the_folder_loads_nothing_before_a_check_is_asked_for():
    code = "from learner import check; import sys; print('torch' in sys.modules); check.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
