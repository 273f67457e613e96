"""A frozen base shared out among the ranks of a client: each keeps its part of every layer, and borrows the rest.

torch's fully_shard (FSDP2; Zhao et al., "PyTorch FSDP", arXiv 2304.11277): a decoder layer's weights are gathered before
its forward and again before its backward, and dropped after each. The adapter stays whole on every rank, since it is
one flat buffer that the optimiser steps; so do embeddings, head and norms, which prompt-learning methods and sampling
ask for outside of any layer. The base is loaded and adapted in ordinary memory first and then moved, so a GPU never
holds all of it. This file does not know what is trained or by whom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fedloom.models.adapters import AdaptedModel
from fedloom.models.layers import find_layers


def sharded(model: AdaptedModel, device: str, ranks: int) -> AdaptedModel:
    """`model`, made on the CPU, with its base's layers sharded over all ranks and everything on `device`.

    The result takes the place of `model`, whose buffers it does not share. Every rank has to come here with the same
    model, and then to every forward pass.
    """
    assert not model.full, "nothing of a model that trains as a whole is frozen"
    mesh = init_device_mesh(torch.device(device).type, (ranks,))
    causal_lm: Any = model.causal_lm
    trained = {p for p in model.module.parameters() if p.requires_grad}
    _, layers = find_layers(causal_lm)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in model.module.parameters() if p.requires_grad or id(p) not in inside}
    fully_shard(causal_lm.base_model, mesh=mesh, ignored_params=whole)  # no weights of its own: it leads the layers
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.module.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return AdaptedModel(model.module, model.base)
