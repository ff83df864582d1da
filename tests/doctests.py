"""Examples in docstrings."""

import doctest


def run_examples(*modules):
    """Check examples as pasted, without their modules' own names; give whose they are."""
    seen = set()
    for module in modules:
        for test in doctest.DocTestFinder().find(module, globs={}):
            if test.examples:
                assert doctest.DocTestRunner().run(test).failed == 0
                seen.add(test.name.split(".")[-1])
    return seen
