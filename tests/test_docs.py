"""What the documents show is what happens."""

import doctest

from small import ROOT


def test_generation_is_as_told(monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "generation.md"), module_relative=False)
    assert failed == 0 and tried > 15
