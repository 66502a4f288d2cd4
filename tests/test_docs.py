"""The examples in the documents print what they show."""

import doctest

from small import ROOT


def test_examples_print_what_generation_md_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "generation.md"), module_relative=False)
    assert failed == 0 and tried > 15
