"""Warnings are left out without bringing back others."""
import re
import warnings

import pytest

from learner.base.warned import ignored, once_by_workers, quiet


@pytest.fixture
def seen():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        yield seen


def test_the_filters_are_as_before_also_after_an_error(seen):
    before = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), quiet(ignored("a"), ignored("", FutureWarning)): raise ZeroDivisionError
    assert list(warnings.filters) == before


def test_what_is_filtered_within_stays(seen):
    with quiet(): warnings.filterwarnings("ignore", "the user's")
    warnings.warn("the user's", stacklevel=1)
    assert seen == []


@pytest.mark.parametrize("filters, left", [
    ((), []), ((ignored("one"),), ["two"]), ((ignored("", DeprecationWarning),), ["one", "two"]),
    ((ignored("", UserWarning, re.escape(__name__)),), []), ((ignored("", UserWarning, "elsewhere"),), ["one", "two"])])
def test_what_the_filters_name_is_left_out(seen, filters, left):
    with quiet(*filters):
        for text in ("one", "two"): warnings.warn(text, stacklevel=1)
    assert [str(each.message) for each in seen] == left


def test_the_process_itself_shows_all_and_is_left_as_it_was(seen):
    shown = warnings.showwarning
    warnings.simplefilter("always")
    with once_by_workers(), once_by_workers():
        for _ in range(3): warnings.warn("the user's", stacklevel=1)
    assert len(seen) == 3 and warnings.showwarning is shown
