"""The frozen prefix: what the layers below the first trained one give for an example, computed once and kept.

Nothing trains there and nothing is drawn at random there, so the hidden states that enter the first trained layer depend on
the base and on the example's tokens alone. Each example goes through the prefix by itself, whatever batch it is in and
whether it was kept or not: what training sees does not depend on what the cache holds, and a resumed run has the same bits.
Against a run without the cache rounding differs, as between any two layouts of a batch (DESIGN: 1e-5).

States are files in a folder for each base, named by its digest: weights, configuration, versions and kind of device. A
file is named by the tokens and the precision that they went through in. They tell of the text as its tokens do.
Once `limit` bytes are reached, states of other bases go, the longest unused first; then nothing more is taken in, which
serves examples that come round again and again better than dropping old ones would. This file does not know who trains.
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
from fedloom.models.layers import find_layers, first_trained

if TYPE_CHECKING:
    from fedloom.models.adapters import AdaptedModel

MEGABYTE = 1 << 20


#: Attributes by which attention modules of transformers keep a probability of dropout.
DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob")


def no_prefix(model: AdaptedModel, packed: bool) -> str:
    """Why this model has no frozen prefix whose states can be kept, as half a sentence; empty where it has."""
    if not packed:
        return "batches are padded"
    first = first_trained(model)
    if not first:
        return "something that trains lies in the first layer or before it (adapter.layers chooses later ones)"
    if _drops_out(model, first):
        return "the base drops out at random below the first trained layer"
    return ""


def _drops_out(model: AdaptedModel, first: int) -> bool:
    _, layers = find_layers(model.causal_lm)
    above = {id(m) for layer in list(layers.children())[first:] for m in layer.modules()}
    below = [m for m in model.causal_lm.modules() if id(m) not in above]
    rates = [m.p for m in below if isinstance(m, nn.Dropout)]
    rates += [getattr(m, name, 0.0) for m in below for name in DROPOUTS]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


class PrefixCache:
    """The states of one model's prefix.

    Args:
        folder: where bases have a folder each; None keeps nothing.
        limit: bytes that `folder` may hold.

    Attributes:
        first: the first trained layer.
        computed: lengths of the sequences that went through the prefix for the last batch.
    """

    def __init__(self, model: AdaptedModel, folder: Path | None = None, limit: int = 0) -> None:
        self.first = first_trained(model)
        path, layers = find_layers(model.causal_lm)
        self._layers: list[Any] = list(layers.children())
        self._above = tuple(f"{path}.{name}." for name, _ in list(layers.named_children())[self.first :])
        self._limit = limit
        self.computed: tuple[int, ...] = ()
        self._wrapped = _wraps(model, self._layers[0])
        self._folder = folder / prefix_digest(model, self._above) if folder else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)

    def serves(self, model: AdaptedModel) -> bool:
        """Whether the prefix is now as it was loaded: an algorithm may have put a delta into it."""
        return all(name.startswith(self._above) for name in model.changed)

    @contextmanager
    def standing_in(self, model: AdaptedModel, batch: Batch) -> Iterator[None]:
        """In this block the layers of the prefix are passed by, and the first trained one is given `batch`'s states."""
        states = self.states(model, batch)
        with ExitStack() as undo:
            for layer in self._layers[: self.first - 1]:
                undo.enter_context(self._instead(layer, None))
            undo.enter_context(self._instead(self._layers[self.first - 1], states))
            yield

    @torch.no_grad()
    def states(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """What enters the first trained layer for a packed batch: [1, T, width]."""
        parts, computed = [], []
        for ids in torch.split(batch.ids[0], list(batch.lengths)):
            path = self._file(model, ids)
            found = self._kept(path, len(ids))
            if found is None:
                found = self._through(model, ids)
                computed.append(len(ids))
                self._keep(path, found)
            parts.append(found.to(model.device))
        self.computed = tuple(computed)
        return torch.cat(parts)[None]

    def _through(self, model: AdaptedModel, ids: torch.Tensor) -> torch.Tensor:
        """One sequence [n] through the prefix alone: [n, width]."""
        seen: list[torch.Tensor] = []
        model.causal_lm.config._attn_implementation = PACKED[model.base.attention]
        at = torch.arange(len(ids), device=ids.device)
        with ExitStack() as undo:
            for layer in self._layers[self.first :]:
                undo.enter_context(self._instead(layer, None))
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
    def _instead(self, layer: Any, states: torch.Tensor | None) -> Iterator[None]:
        """`layer` gives `states`, or what it is given, as long as this block lasts."""

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = hidden_states if states is None else states.to(hidden_states.dtype)
            return (out,) if self._wrapped else out

        before = vars(layer).get("forward")  # a compiled layer has one of its own
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

    def _kept(self, path: Path | None, length: int) -> torch.Tensor | None:
        if path is None:
            return None
        try:
            found = load_file(path)["states"]
        except (OSError, SafetensorError, KeyError):  # not there, torn, or being deleted: computed
            return None
        return found if len(found) == length else None

    def _keep(self, path: Path | None, states: torch.Tensor) -> None:
        """Write a state, whole or not at all; a folder that is full or read-only costs time, nothing else."""
        if path is None:
            return
        with contextlib.suppress(OSError, SafetensorError):
            if not self._room(states.nbytes):
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

    def _room(self, size: int) -> bool:
        """Whether so many bytes more stay within the limit, other bases' states deleted where they are in the way."""
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
def _wraps(model: AdaptedModel, layer: nn.Module) -> bool:
    """Whether this model's layers give a tuple, as some architectures' do, and not a tensor. A tiny forward tells."""
    seen: list[bool] = []
    hook = layer.register_forward_hook(lambda m, i, out: seen.append(isinstance(out, tuple)))
    with attention.using(model.causal_lm, attention.plain(model.causal_lm)):
        model.causal_lm(input_ids=torch.full((1, 3), 3, device=model.device), use_cache=False)
    hook.remove()
    return seen[0]


def prefix_digest(model: AdaptedModel, above: tuple[str, ...]) -> str:
    """sha256 (hex, shortened) of all that the states of a prefix depend on but for the tokens.

    Args:
        above: what the names of tensors begin with that the prefix does not have.
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
def known_prefix(cache: PrefixCache, model: AdaptedModel, batch: Batch) -> Iterator[None]:
    """A forward pass of a packed batch in this block starts at the first trained layer, where the cache serves it."""
    if not cache.serves(model):
        yield
        return
    with cache.standing_in(model, batch):
        yield
