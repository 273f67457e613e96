"""A library of an extra that is not installed is a sentence; any other missing module stays an error of the code."""

from __future__ import annotations

import pytest

from fedloom.common.errors import UserError
from fedloom.common.extras import EXTRAS, needing_extras


@pytest.mark.parametrize("library", EXTRAS)
def test_a_missing_library_names_its_extra(library):
    sentence = rf"^{library} is not installed: pip install 'fedloom\[{EXTRAS[library]}\]'$"
    with pytest.raises(UserError, match=sentence), needing_extras():
        raise ModuleNotFoundError(f"No module named '{library}.part'", name=f"{library}.part")


def test_other_missing_modules_are_not_hidden():
    with pytest.raises(ModuleNotFoundError, match="nowhere"), needing_extras():
        import nowhere  # noqa: F401
