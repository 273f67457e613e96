"""`python -m fedloom` is the `fedloom` command."""

from fedloom.cli import main

main()
