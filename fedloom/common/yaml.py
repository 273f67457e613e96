"""YAML as recipes, kits and sites write and read it."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, which YAML 1.1 reads as text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


def load_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    loader = _Loader(text)  # a SafeLoader: plain values only
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(values: Any) -> str:
    """Text that `load_yaml` reads back as the same values."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))
