"""Read and write the YAML of recipes, kits and sites."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A loader that reads 1e-3 as a number, which YAML 1.1 reads as text."""


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which `_Loader` would read as a number."""


def load_yaml(text: str) -> Any:
    """Parse YAML. Raises yaml.YAMLError."""
    loader = _Loader(text)  # a SafeLoader: plain values only
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(values: Any) -> str:
    """Write values as text that `load_yaml` reads back as the same values."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))
