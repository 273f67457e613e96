"""Shard a frozen base among the ranks of a client: each stores its part of every layer and fetches the rest.

torch's fully_shard (FSDP2; Zhao et al., "PyTorch FSDP", arXiv 2304.11277): ranks gather a decoder layer's weights
before
its forward and again before its backward, and drop them after each. The adapter stays whole on every rank, since it is
one flat buffer that the optimiser updates. Embeddings, head and norms stay whole too, since prompt-learning methods and
sampling use them outside the layers. The base is loaded and adapted in ordinary memory first and then moved, so a GPU
never stores all of it. This file does not know what is trained, or who trains it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fedloom.models.adapters import AdaptedModel
from fedloom.models.layers import find_layers


def shard_base(model: AdaptedModel, device: str, ranks: int) -> AdaptedModel:
    """Shard the layers of a model's base over all ranks and move everything to `device`.

    Every rank has to call this with the same model, and then take part in every forward pass.

    Args:
        model: built on the CPU. The result replaces it and does not share its buffers.
        device: of this rank.
        ranks: their number.
    """
    assert not model.full, "full fine-tuning leaves nothing frozen to shard"
    mesh = init_device_mesh(torch.device(device).type, (ranks,))
    causal_lm: Any = model.causal_lm
    trained = {p for p in model.module.parameters() if p.requires_grad}
    _, layers = find_layers(causal_lm)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in model.module.parameters() if p.requires_grad or id(p) not in inside}
    fully_shard(causal_lm.base_model, mesh=mesh, ignored_params=whole)  # the root of the layers, without own weights
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.module.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return AdaptedModel(model.module, model.base)
