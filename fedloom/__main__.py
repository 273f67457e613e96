"""`python -m fedloom` is the `fedloom` command."""

from __future__ import annotations

from fedloom.cli.main import main

main()
