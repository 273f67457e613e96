"""What the model rules out: positions, memory, and ways of computing. Each is tried on a few tokens at most."""

from __future__ import annotations

from fedloom.federation.checks.facts import ModelFacts
from fedloom.federation.checks.rule import Rule
from fedloom.models.forward import supports_chunks, supports_packing, supports_prefix
from fedloom.models.prefix_cache import prefix_obstacle
from fedloom.models.recompute import recompute_obstacle
from fedloom.training.cohort_probe import refusal
from fedloom.training.compiling import trouble


def _positions(f: ModelFacts) -> int:
    """How many positions the longest sequence needs, where the model has fewer."""
    needed = f.recipe.data.max_length + f.model.virtual_tokens
    return needed if f.model.virtual_tokens and f.positions and needed > f.positions else 0


def _no_prefix(f: ModelFacts) -> str:
    if f.train.cache_prefix is None:
        return ""
    why = prefix_obstacle(f.model, f.packed)
    return why or (
        "" if supports_prefix(f.model) else "this model's later layers need more than what the one before gives"
    )


def _alone(f: ModelFacts) -> str:
    """Why no clients can train together on this model, where the recipe asks for a number of them."""
    if f.train.cohort in ("off", "auto"):
        return ""
    if not f.packed:
        return "this model's batches are padded"
    sampled = f.schedule.sampled()
    return refusal(f.model) or (f"a round has {sampled} client" if sampled < 2 else "")


#: The memory of simulated devices.
ROOM_RULES = (
    Rule[ModelFacts](
        "room.clients",
        "`devices.memory` in which too few clients have room for the model",
        lambda f: f.fleet is not None and len(f.fitting) < f.fewest,
        lambda f, _: (
            f"only {len(f.fitting)} clients have the {f.needed:,} bytes that this model takes and {f.fewest} are needed: "
            "raise devices.memory.median, or take a smaller model"
        ),
    ),
    Rule[ModelFacts](
        "room.coming",
        "`devices` of which too few can ever end their work",
        lambda f: len(f.fitting) >= f.fewest > f.coming,
        lambda f, _: (
            f"only {f.coming} of {len(f.fitting)} clients can ever be there and end their work, and {f.fewest} are needed: "
            "raise available above 0 and lower dropout below 1, in devices or in devices.trace"
        ),
    ),
    Rule[ModelFacts](
        "room.sampled",
        "more `federation.clients_per_round` than clients with room for the model",
        lambda f: f.coming >= f.fewest and f.schedule.federation.sampled(len(f.fitting)) > len(f.fitting),
        lambda f, _: (
            f"federation.clients_per_round={f.recipe.federation.clients_per_round} but only {len(f.fitting)} clients have "
            "room for the model: ask for fewer"
        ),
    ),
)


MODEL_RULES = (
    Rule[ModelFacts](
        "model.positions",
        "a `data.max_length` that leaves no positions for virtual tokens",
        _positions,
        lambda f, needed: (
            f"data.max_length={f.recipe.data.max_length} and {f.model.virtual_tokens} virtual tokens need {needed} "
            f"positions, but the model has {f.positions}: set data.max_length={(f.positions or 0) - f.model.virtual_tokens} "
            "or fewer"
        ),
    ),
    Rule[ModelFacts](
        "model.packing",
        "`train.packing: on` with a model that mixes packed sequences",
        lambda f: f.recipe.train.packing == "on" and not supports_packing(f.model),
        lambda f, _: "train.packing=on but this model does not keep packed sequences apart: use train.packing=auto",
    ),
    Rule[ModelFacts](
        "model.checkpointing",
        "`train.checkpointing` with a model whose layers cannot be computed again",
        lambda f: f.train.checkpointing and recompute_obstacle(f.model, f.packed),
        lambda f, why: f"train.checkpointing=true cannot be used: {why}; set train.checkpointing=false",
    ),
    Rule[ModelFacts](
        "model.loss_chunk",
        "`train.loss_chunk` with a model that changes its logits after its head",
        lambda f: f.train.loss_chunk is not None and not supports_chunks(f.model),
        lambda f, _: (
            f"train.loss_chunk={f.train.loss_chunk} cannot be used: this model changes its logits after its head; leave it "
            "out"
        ),
    ),
    Rule[ModelFacts](
        "model.offload",
        "`train.optimizer_offload: cpu` with a model that is on the CPU",
        lambda f: f.train.optimizer_offload == "cpu" and f.model.device.type == "cpu" and not f.elsewhere,
        lambda f, _: (
            "train.optimizer_offload=cpu but the model is on the CPU, and the optimiser's state with it: leave it out, or "
            "set train.optimizer_offload=disk"
        ),
    ),
    Rule[ModelFacts](
        "model.compile",
        "`train.compile` where nothing compiles, or compiled layers give another gradient",
        lambda f: f.train.compile and not f.elsewhere and trouble(f.model, f.train, f.packed),
        lambda f, why: f"train.compile=true cannot be used: {why}; set train.compile=false",
    ),
    Rule[ModelFacts](
        "model.cache_prefix",
        "`train.cache_prefix` with a model or an adapter whose first layers cannot be kept",
        _no_prefix,
        lambda f, why: f"train.cache_prefix={f.train.cache_prefix} cannot be used: {why}; leave it out",
    ),
    Rule[ModelFacts](
        "model.cohort",
        "a number as `train.cohort` with a model that does not give each client what it gives it alone",
        _alone,
        lambda f, why: f"train.cohort={f.train.cohort} cannot be used: {why}; set train.cohort=off (docs/cohort.md)",
    ),
)
