"""Cut a decoder into the layers that are tuned and the middle between them, and thin the middle.

    adapter   the first `bottom` and the last `top` layers
    middle    the layers between them. The *emulator* is all of them, or evenly spread ones with the first and the last

Offsite-tuning (Xiao et al., arXiv 2302.04870) calls the three parts A₁, E, A₂. A thinned model keeps the *names* of the
full one: layer 7 is `…layers.7…` in both. So every tensor returns under its own name, and nothing is matched by
position. Works for every transformers decoder whose layers are in one ModuleList. This file does not know how weights
are compressed or what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedloom.common.errors import UserError
from fedloom.models.layers import find_layers

#: Attributes in which a layer's modules store its index in the key-value cache.
PLACES = ("layer_idx", "layer_id")


@dataclass(frozen=True)
class Cut:
    """The places where a decoder is cut.

    Attributes:
        path: name of the ModuleList with the layers, such as ``model.layers``.
        total: number of layers of the full model.
        bottom, top: how many first and last layers are the adapter.
        kept: original indices of the middle layers that the emulator keeps, in order.
    """

    path: str
    total: int
    bottom: int
    top: int
    kept: tuple[int, ...]

    @property
    def outer(self) -> tuple[int, ...]:
        """Original indices of the adapter's layers."""
        return (*range(self.bottom), *range(self.total - self.top, self.total))

    @property
    def middle(self) -> tuple[int, ...]:
        return tuple(range(self.bottom, self.total - self.top))

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(i for i in self.middle if i not in self.kept)

    @property
    def emulated(self) -> tuple[int, ...]:
        """Position in the emulator's model → original index."""
        return (*range(self.bottom), *self.kept, *range(self.total - self.top, self.total))

    def prefixes(self, layers: Sequence[int]) -> tuple[str, ...]:
        """Return the prefixes of the names of these layers' tensors."""
        return tuple(f"{self.path}.{i}." for i in layers)


def cut_model(model: nn.Module, bottom: int, top: int, drop: float = 0.0, *, hide: bool = True) -> Cut:
    """Cut `model` and drop the share `drop` of its middle. Raises UserError if the model has too few layers.

    Args:
        model: a transformers decoder.
        bottom, top: how many first and last layers are the adapter.
        drop: share of the middle's layers to drop.
        hide: whether there has to be a middle; without one no part of the model stays with the server.
    """
    path, layers = find_layers(model)
    total = len(layers)
    needed = bottom + top + (1 if hide else 0)
    if total < needed:
        raise UserError(
            f"this model has {total} layers, but algorithm.bottom={bottom} and algorithm.top={top}"
            f"{' with a middle between them' if hide else ''} need {needed}: lower algorithm.bottom and algorithm.top"
        )
    return Cut(path, total, bottom, top, thin_middle(range(bottom, total - top), drop))


def thin_middle(middle: Sequence[int], drop: float) -> tuple[int, ...]:
    """Drop the share `drop` of `middle`: the rest is evenly spread and includes the first and the last.

    Offsite-tuning does the same (2302.04870).
    """
    count = len(middle) - round(drop * len(middle))
    if count == len(middle):
        return tuple(middle)
    if count < 2:
        most = (len(middle) - 2) / len(middle) if len(middle) > 2 else 0.0
        raise UserError(
            f"algorithm.drop={drop:g} leaves {count} of the middle's {len(middle)} layers, but the first and the last "
            f"always stay: set algorithm.drop={int(100 * most) / 100:g} or less"
        )
    span, gaps = len(middle) - 1, count - 1
    return tuple(middle[(2 * i * span + gaps) // (2 * gaps)] for i in range(count))


class ThinLayers(nn.ModuleList):
    """Some of a model's layers, named by their original indices; indexing is by position."""

    def __init__(self, layers: nn.ModuleList, kept: Sequence[int]) -> None:
        super().__init__()
        for i in kept:
            self.add_module(str(i), layers[i])

    def __getitem__(self, index: Any) -> Any:
        modules = list(self._modules.values())
        return nn.ModuleList(modules[index]) if isinstance(index, slice) else modules[index]


def thin(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Leave only the adapter's and the emulator's layers in `model`. Returns a function that undoes it.

    Also thins the configuration's lists with one entry per layer, and renumbers the layers' indices in the key-value
    cache.
    """
    whole = model.get_submodule(cut.path)
    assert isinstance(whole, nn.ModuleList)
    parent_name, _, name = cut.path.rpartition(".")
    parent = model.get_submodule(parent_name)
    configs = _configs(model)
    before = [(c, {k: v for k, v in vars(c).items() if _per_layer(v, cut.total)}) for c in configs]
    parts = [(part, attribute) for layer in whole for part in layer.modules() for attribute in PLACES]
    places = [(part, attribute, vars(part)[attribute]) for part, attribute in parts if attribute in vars(part)]
    position = {original: i for i, original in enumerate(cut.emulated)}

    setattr(parent, name, ThinLayers(whole, cut.emulated))
    for config, lists in before:
        config.num_hidden_layers = len(position)
        for key, values in lists.items():
            setattr(config, key, [values[i] for i in cut.emulated])
    for part, attribute, index in places:
        if index in position:
            setattr(part, attribute, position[index])

    def undo() -> None:
        setattr(parent, name, whole)
        for config, lists in before:
            config.num_hidden_layers = cut.total
            for key, values in lists.items():
                setattr(config, key, values)
        for part, attribute, index in places:
            setattr(part, attribute, index)

    return undo


@contextmanager
def emulate(model: nn.Module, cut: Cut, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make `model` the emulator's model in this block: thinned, with `weights` (by name) in its middle.

    The weights may be results of a computation; gradients reach its inputs. Nothing is copied.
    """
    undo = thin(model, cut)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, tensor in weights.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            original = module._parameters.pop(leaf)
            assert original is not None
            replaced.append((module, leaf, original))
            object.__setattr__(module, leaf, tensor)
        yield
    finally:
        for module, leaf, original in replaced:
            object.__delattr__(module, leaf)
            module._parameters[leaf] = original
        undo()


def _configs(model: nn.Module) -> list[Any]:
    """Return the configuration, and its text part if that is another object. Submodules share these objects."""
    config: Any = model.config
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _per_layer(value: Any, total: int) -> bool:
    """Return whether a configuration's value has one entry per layer (`layer_types`, `no_rope_layers` …)."""
    return isinstance(value, list | tuple) and len(value) == total and total > 1
