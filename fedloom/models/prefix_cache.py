"""The frozen prefix: the output of the layers below the first trained one, computed once per example and stored.

Nothing trains in the prefix and nothing is random there. So the hidden states that enter the first trained layer depend
only on the base and the example's tokens. Each example goes through the prefix by itself, in whatever batch it is and
whether or not its states are stored. So training does not depend on the content of the cache, and a resumed run gives
the same bits. Compared with a run without the cache, rounding differs as between two batch layouts (1e-5).

States are files, in one folder per base. The folder's name is a digest of weights, configuration, versions and kind of
device; the file's name is a digest of the tokens and their precision. The files reveal the text as its tokens do.
At the limit of `limit` bytes, the cache deletes the states of other bases, the longest unused first. After that it
stores no new states. Examples repeat, so this serves them better than deleting old states. This file does not know who
trains.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedloom.data.batching import Batch
from fedloom.models.attention import packed as attention
from fedloom.models.attention.gpu import PACKED
from fedloom.models.layers import find_layers, first_trained_layer

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel

MEGABYTE = 1 << 20


#: Attributes in which attention modules of transformers store a dropout probability.
DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob")


def prefix_obstacle(model: AdaptedModel, packed: bool) -> str:
    """Return why this model has no frozen prefix to store states of, as half a sentence; empty if it has one."""
    if not packed:
        return "batches are padded"
    first = first_trained_layer(model)
    if not first:
        return "something trains in the first layer or before it (set adapter.layers to later layers)"
    if _has_dropout(model, first):
        return "the base has dropout below the first trained layer"
    return ""


def _has_dropout(model: AdaptedModel, first: int) -> bool:
    _, layers = find_layers(model.causal_lm)
    above = {id(m) for layer in list(layers.children())[first:] for m in layer.modules()}
    below = [m for m in model.causal_lm.modules() if id(m) not in above]
    rates = [m.p for m in below if isinstance(m, nn.Dropout)]
    rates += [getattr(m, name, 0.0) for m in below for name in DROPOUTS]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


class PrefixCache:
    """The stored states of one model's prefix.

    Args:
        model: the model whose frozen layers are the prefix.
        folder: has one folder per base; None stores nothing.
        limit: largest size of `folder`, in bytes.

    Attributes:
        first: index of the first trained layer.
        computed: lengths of the last batch's sequences that were not stored and went through the prefix.
    """

    def __init__(self, model: AdaptedModel, folder: Path | None = None, limit: int = 0) -> None:
        self.first = first_trained_layer(model)
        path, layers = find_layers(model.causal_lm)
        self._layers: list[Any] = list(layers.children())
        self._above = tuple(f"{path}.{name}." for name, _ in list(layers.named_children())[self.first :])
        self._limit = limit
        self.computed: tuple[int, ...] = ()
        self._wrapped = _returns_tuple(model, self._layers[0])
        self._folder = folder / prefix_digest(model, self._above) if folder else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)

    def fits_model(self, model: AdaptedModel) -> bool:
        """Return whether the prefix is as it was loaded: an algorithm may have added a delta to it."""
        return all(name.startswith(self._above) for name in model.changed)

    @contextmanager
    def replace_prefix(self, model: AdaptedModel, batch: Batch) -> Iterator[None]:
        """Skip the prefix's layers in this block: the first trained layer gets `batch`'s stored states."""
        states = self.states(model, batch)
        with ExitStack() as undo:
            for layer in self._layers[: self.first - 1]:
                undo.enter_context(self._replace_forward(layer, None))
            undo.enter_context(self._replace_forward(self._layers[self.first - 1], states))
            yield

    @torch.no_grad()
    def states(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """Return the input of the first trained layer for a packed batch: [1, T, width]."""
        parts, computed = [], []
        for ids in torch.split(batch.ids[0], list(batch.lengths)):
            path = self._file(model, ids)
            found = self._load(path, len(ids))
            if found is None:
                found = self._compute(model, ids)
                computed.append(len(ids))
                self._store(path, found)
            parts.append(found.to(model.device))
        self.computed = tuple(computed)
        return torch.cat(parts)[None]

    def _compute(self, model: AdaptedModel, ids: torch.Tensor) -> torch.Tensor:
        """Compute the states [n, width] of one sequence [n] by the prefix alone."""
        seen: list[torch.Tensor] = []
        model.causal_lm.config._attn_implementation = PACKED[model.base.attention]
        at = torch.arange(len(ids), device=ids.device)
        with ExitStack() as undo:
            for layer in self._layers[self.first :]:
                undo.enter_context(self._replace_forward(layer, None))
            last = self._layers[self.first - 1]
            hook = last.register_forward_hook(lambda m, i, out: seen.append(out[0] if self._wrapped else out))
            undo.callback(hook.remove)
            model.causal_lm(
                input_ids=ids[None],
                position_ids=at[None],
                segment_lengths=(len(ids),),
                logits_to_keep=at[-1:],
                use_cache=False,
            )
        return seen[0][0]

    @contextmanager
    def _replace_forward(self, layer: Any, states: torch.Tensor | None) -> Iterator[None]:
        """Make `layer` return `states`, or its own input if they are None, within this block."""

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = hidden_states if states is None else states.to(hidden_states.dtype)
            return (out,) if self._wrapped else out

        before = vars(layer).get("forward")  # a compiled layer has its own
        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward
            if before is not None:
                layer.forward = before

    # ------------------------------------------------------------------ on disk

    def _file(self, model: AdaptedModel, ids: torch.Tensor) -> Path | None:
        if self._folder is None:
            return None
        kind = model.device.type
        how = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        key = hashlib.sha256(how.encode() + ids.cpu().numpy().tobytes()).hexdigest()[:32]
        return self._folder / f"{key}.safetensors"

    def _load(self, path: Path | None, length: int) -> torch.Tensor | None:
        if path is None:
            return None
        try:
            found = load_file(path)["states"]
        except (OSError, SafetensorError, KeyError):  # missing, damaged, or deleted meanwhile: compute it again
            return None
        return found if len(found) == length else None

    def _store(self, path: Path | None, states: torch.Tensor) -> None:
        """Write a state completely or not at all.

        If the folder is full or read-only, states are computed again; nothing fails.
        """
        if path is None:
            return
        with contextlib.suppress(OSError, SafetensorError):
            if not self._make_room(states.nbytes):
                return
            handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            os.close(handle)
            try:
                save_file({"states": states.cpu().contiguous()}, scratch)
                os.replace(scratch, path)
                self._used += states.nbytes
            finally:
                Path(scratch).unlink(missing_ok=True)

    _used: int = -1

    def _make_room(self, size: int) -> bool:
        """Return whether `size` more bytes fit within the limit. Deletes other bases' states to make room."""
        assert self._folder is not None
        if self._used < 0:
            self._used = sum(_size(f) for f in self._folder.parent.iterdir())
        if self._used + size <= self._limit:
            return True
        others = sorted(
            (f for f in self._folder.parent.iterdir() if f != self._folder), key=lambda f: f.stat().st_mtime
        )
        for other in others:
            shutil.rmtree(other, ignore_errors=True)
            self._used = sum(_size(f) for f in self._folder.parent.iterdir())
            if self._used + size <= self._limit:
                return True
        return False


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@torch.no_grad()
def _returns_tuple(model: AdaptedModel, layer: nn.Module) -> bool:
    """Check by a tiny forward pass whether this model's layers return a tuple, as some architectures' do."""
    seen: list[bool] = []
    hook = layer.register_forward_hook(lambda m, i, out: seen.append(isinstance(out, tuple)))
    with attention.use_attention(model.causal_lm, attention.default_attention(model.causal_lm)):
        model.causal_lm(input_ids=torch.full((1, 3), 3, device=model.device), use_cache=False)
    hook.remove()
    return seen[0]


def prefix_digest(model: AdaptedModel, above: tuple[str, ...]) -> str:
    """Return the sha256 (hex, 32 digits) of everything, except the tokens, that a prefix's states depend on.

    Args:
        model: the model with the prefix.
        above: name prefixes of the tensors that are not in the prefix.
    """
    config = {k: v for k, v in model.causal_lm.config.to_dict().items() if k not in {"_name_or_path", "dtype"}}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"{torch.__version__}/{transformers.__version__}/{model.device.type}/{above}".encode())
    for name, tensor in sorted(model.frozen_tensors().items()):
        if not name.startswith(above):
            digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@contextmanager
def use_prefix(cache: PrefixCache, model: AdaptedModel, batch: Batch) -> Iterator[None]:
    """A forward pass of a packed batch in this block starts at the first trained layer, where the cache serves it."""
    if not cache.fits_model(model):
        yield
        return
    with cache.replace_prefix(model, batch):
        yield
