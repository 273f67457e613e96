"""Run folders with made-up numbers, so that the report's tests need no model."""

from tests.helpers.run_folders import run_folder  # noqa: F401
