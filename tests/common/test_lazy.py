from __future__ import annotations

import sys

import pytest

from fedloom.common.lazy import lazy


def test_a_name_is_imported_when_it_is_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    names, find, listed = lazy("pack", {"queue": "queue", "Fraction": "fractions", "nowhere": "this"}, eager=("own",))
    assert names == listed() == ["Fraction", "nowhere", "own", "queue"]
    assert find("Fraction")(1, 2) * 2 == 1
    assert "this" not in sys.modules
    with pytest.raises(AttributeError, match="module 'pack' has no attribute 'other'"):
        find("other")
