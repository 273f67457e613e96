"""`fedloom` as a process of its own (launch.py)."""

from launch import cli, launch_folder, recipe_file  # noqa: F401
