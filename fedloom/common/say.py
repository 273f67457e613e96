"""Told one sentence at a time: what a long piece of work wants its user to know."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
