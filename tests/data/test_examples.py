import doctest
import inspect

import pytest

from vlkern import data

THINGS = [thing for name in data.__all__ if ">>>" in (inspect.getdoc(thing := getattr(data, name)) or "")]


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_docstring_example_runs(thing):
    names = {name: getattr(data, name) for name in data.__all__}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), names, thing.__name__, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
