"""A base model with one adapter. peft builds the adapter; one flat buffer stores its parameters.

recipe/adapter.py has the table of methods; saved.py reads what `save` wrote. Every trainable parameter is a window into
`adapter.flat`, and its gradient a window into `grad`. So training, swapping and clipping are single operations on one
tensor. This file does not know who trains or what is sent.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.common.errors import UserError
from fedloom.models.base_delta import check_delta, make_delta_hook
from fedloom.models.layout import Adapter, Layout, swap
from fedloom.models.loading import Base, load_base, quiet_transformers
from fedloom.recipe.recipe import ModelConfig

if TYPE_CHECKING:
    from fedloom.models.prefix_cache import PrefixCache

#: A second file, with all trained tensors, where peft's own file omits some (P-tuning's network, for example).
TRAINED = "trained.safetensors"


class AdaptedModel:
    """A frozen base with one live adapter, or under full fine-tuning a base that is all adapter.

    Attributes:
        module: the model to call: peft's model around the base, or the base itself.
        base: the base model and its tokenizer.
        adapter: the live adapter; writing into its flat buffer changes the model at once.
        grad: [numel], the gradient of `adapter.flat`.
        parameter: `adapter.flat` as one parameter with that gradient, for the optimiser.
        causal_lm: the transformers model inside, whose configuration holds the attention function.
        device: of adapter and base.
        backward: adds the gradient of a loss to `grad`. All backward passes come through it; a seat of a cohort has its own.
        orthogonality: how much `penalty` counts (AdaLoRA); 0 where there is none.
        initial: [numel], the adapter as it was created from the seed.
        full: whether weights of the base itself are trained, in all layers or in some. Tied weights are one tensor
            then, under the first of their names.
        virtual_tokens: the number v of virtual tokens of prompt tuning, P-tuning and prefix tuning; 0 elsewhere.
        prefixed: whether the virtual tokens are keys and values of every layer, not embeddings.
        loss_chunk: tokens whose logits are computed at a time (recompute.py); None computes all at once.
        prefix: the cache of the frozen layers' states (prefix_cache.py), or None.
        changed: base weights that have a delta now.
    """

    def __init__(self, module: Any, base: Base) -> None:
        self.module = module
        self.base = base
        self.full = not isinstance(module, PeftModel)
        config: Any = None if self.full else module.peft_config["default"]
        self.virtual_tokens: int = config.num_virtual_tokens if config and config.is_prompt_learning else 0
        self.prefixed: bool = self.virtual_tokens > 0 and config.peft_type == PeftType.PREFIX_TUNING
        self.orthogonality = float(getattr(config, "orth_reg_weight", 0.0))
        trainable = {_plain(name): p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise UserError("this model has nothing to train: set adapter.target_modules to layers that it has")
        self.adapter = Adapter(Layout({n: p.shape for n, p in trainable.items()}), base.device)
        self.grad = torch.zeros_like(self.adapter.flat)
        gradients = self.adapter.layout.views(self.grad)
        with torch.no_grad():
            for name, view in self.adapter.views.items():
                view.copy_(trainable[name])
                trainable[name].data = view
                trainable[name].grad = gradients[name]  # autograd adds into it, in place
        self.causal_lm: PreTrainedModel = base.model
        self.device = self.adapter.flat.device
        self.backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
        self.parameter = torch.nn.Parameter(self.adapter.flat)
        self.parameter.grad = self.grad
        self.initial = self.adapter.flat.detach().clone()
        self.changed: frozenset[str] = frozenset()
        self.prefix: PrefixCache | None = None
        self._base_weights: dict[str, torch.Tensor] = {}
        self._delta_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._swapped = False
        self.loss_chunk: int | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    def initial_adapter(self) -> Adapter:
        """Return a CPU copy of the adapter as it was created from the seed."""
        adapter = Adapter(self.adapter.layout)
        adapter.flat.copy_(self.initial)
        return adapter

    def penalty(self) -> torch.Tensor | None:
        """Return AdaLoRA's penalty γ · mean over its factors of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F; None for other methods.

        As peft computes it. Zhang et al., arXiv 2303.10512, equation 4, squares the norms. P and Q stand for singular
        vectors.
        """
        factors = [n for n in self.adapter.layout.names if n.endswith((".lora_A", ".lora_B"))]
        if not (self.orthogonality and factors):
            return None
        total = self.adapter.flat.new_zeros(())
        for name, p in self.module.named_parameters():
            if _plain(name) in factors:
                gram = p @ p.T if name.endswith(".lora_A.default") else p.T @ p  # [r, r]
                total = total + torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device))
        return self.orthogonality * total / len(factors)

    def lora_scales(self) -> dict[str, float]:
        """Map each base weight to the scale s of its LoRA module (α/r, or α/√r under rsLoRA).

        The layer uses W + s·B·A.
        """
        scales = {}
        for name, module in self.base.model.named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and "default" in scaling:
                scales[f"{name}.weight"] = float(scaling["default"])
        return scales

    def base_weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the base's live parameters by their state dict names. Adapter parameters are among them."""
        return {_base_name(n): p for n, p in self.base.model.named_parameters()}

    def frozen_tensors(self) -> dict[str, torch.Tensor]:
        """Return the base's live frozen tensors by their state dict names. Tied tensors appear once."""
        saved = {_base_name(n) for n in self.base.model.state_dict()}
        tensors = {n: p for n, p in self.base_weights().items() if not p.requires_grad}
        return {**tensors, **{n: b for n, b in self.base.model.named_buffers() if n in saved}}

    def set_base_delta(self, delta: Mapping[str, torch.Tensor] | None, *, into_weights: bool = False) -> None:
        """Set the base weights to their loaded values plus `delta`; None restores the loaded values.

        The sum is computed in fp32. Rounding to 16 bits would lose most of a small delta. So for a 16-bit weight the
        delta stays in fp32, and a hook adds its effect to the layer's output.

        Args:
            delta: state dict name of a weight → what to add: a dense tensor [out, in], or the two factors ``name.B``
                [out, r] and ``name.A`` [r, in] of a product.
            into_weights: also add to 16-bit weights, as an export must.

        Raises:
            ValueError: for a name that the base does not have, a shape that differs from the weight's, one factor
                without the other, or a base whose weights are not floating point. The model is then unchanged.
        """
        delta = delta or {}
        if delta and self.full:
            raise ValueError("a base delta cannot be used with full fine-tuning, which trains the base's own weights")
        weights, transposed = self.base_weights(), self.transposed_weights()
        names = sorted({n.removesuffix(".A").removesuffix(".B") for n in delta})
        for name in names:
            check_delta(name, weights.get(name), delta, name in transposed)
        self.changed = frozenset(names)
        for name, original in self._base_weights.items():
            weights[name].data.copy_(original)
        while self._delta_hooks:
            self._delta_hooks.pop().remove()
        for name in names:
            parts = [delta[n].float().to(self.device) for n in (name, f"{name}.B", f"{name}.A") if n in delta]
            if weights[name].element_size() < 4 and not into_weights:
                hook = make_delta_hook(parts, lambda: not self._swapped)
                self._delta_hooks.append(self._layer(name).register_forward_hook(hook))
                continue
            change = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
            original = self._base_weights.setdefault(name, weights[name].detach().clone())
            weights[name].data.copy_(original.float() + (change.T if name in transposed else change))

    def swap_trained(self) -> None:
        """Swap adapter and base weights with their values before training. A second call restores them exactly.

        Works in place, block by block, so it needs no extra memory. Until the second call `initial` has the trained
        values.
        """
        swap(self.adapter.flat, self.initial)
        weights = self.base_weights()
        for name, original in self._base_weights.items():
            swap(weights[name].data, original)
        self._swapped = not self._swapped

    def transposed_weights(self) -> set[str]:
        """Return the names of the weights that are stored as [in, out], as GPT-2's are."""
        layers = self.base.model.named_modules()
        return {f"{name}.weight" for name, layer in layers if getattr(layer, "fan_in_fan_out", False)}

    def _layer(self, weight: str) -> torch.nn.Module:
        """Return the base's own layer of `weight`: the innermost one, where peft wrapped it in another."""
        layers: Iterator[tuple[str, torch.nn.Module]] = self.base.model.named_modules()
        found = [layer for name, layer in layers if _base_name(f"{name}.weight") == weight]
        return found[-1]

    def save(self, folder: Path, base_name: str) -> None:
        """Write the live adapter to `folder`, for use elsewhere.

        Load it with `PeftModel.from_pretrained(base, folder)`. After full fine-tuning the folder has a whole model:
        load it
        with `AutoModelForCausalLM.from_pretrained(folder)`.
        """
        if self.full:
            save_model(self.module, self.tokenizer, folder)
            return
        self.module.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; reporting/card.py writes a full one
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text())
        values["base_model_name_or_path"] = base_name
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        if set(_saved(folder)) != set(self.adapter.layout.names):
            save_file({n: t.detach().cpu().clone() for n, t in self.adapter.tensors().items()}, str(folder / TRAINED))

    def load(self, folder: Path) -> None:
        """Load what `save` wrote into the live adapter, every tensor of it."""
        if self.full:
            saved = dict(load_base(ModelConfig(name=str(folder))).model.named_parameters())
            self.adapter.load({n: saved[n] for n in self.adapter.layout.names if n in saved})
        else:
            self.adapter.load(_saved(folder))


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    """Read a saved adapter's tensors, under the live adapter's names. Only those that the folder has."""
    everything = folder / TRAINED
    tensors = load_file(str(everything if everything.is_file() else folder / "adapter_model.safetensors"))
    return {"prompt_encoder.embedding.weight" if n == "prompt_embeddings" else n: t for n, t in tensors.items()}


def save_model(module: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers model and its tokenizer to `folder`."""
    with quiet_peft():
        module.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _plain(name: str) -> str:
    """Remove the adapter's own name from a parameter name, as peft does in its saved files."""
    name = name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.default.weight") else name
    return name.replace(".default.", ".").removesuffix(".default")


def _base_name(name: str) -> str:
    """Remove peft's wrapper from the name of a base weight."""
    return name.replace(".base_layer.", ".")


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence progress bars, and the warning about a transformers name that peft still uses and that is deprecated."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft corrects it for GPT-2's layers
        yield
