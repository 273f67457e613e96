"""The command line."""

from fedloom.cli.app import app
from fedloom.cli.main import main

__all__ = ["app", "main"]
