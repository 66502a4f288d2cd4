"""The examples in the documents print what they show."""

import doctest

from small import ROOT


def test_the_examples_of_generation_are_what_happens(monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "generation.md"), module_relative=False)
    assert failed == 0 and tried > 15
