"""Preference tuning against a straight-line DPO: padded, one sequence a forward pass, the base as a model of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from fedloom import run
from fedloom.common.errors import UserError
from fedloom.common.logs import heard_by
from fedloom.data.corpus import Corpus, Example
from fedloom.data.loading import for_objective
from fedloom.data.prompts import Template
from fedloom.data.tokenization import MIN_ANSWER, TokenisedCorpus, TokenSequence, encode
from fedloom.experiment.evaluate import evaluate
from fedloom.models.adapters import AdaptedModel
from fedloom.recipe.recipe import Recipe, TrainConfig
from fedloom.training import objectives
from fedloom.training.objectives import Dpo, unit_losses
from tests.helpers import preferences
from tests.helpers.peft_by_hand import VARIANTS, attached, base_model, moved, plain_peft

BETA = 0.3
EXAMPLES = [
    Example("say two", "", "one two", rejected="three"),
    Example("say", "it", "four", rejected="five six seven"),
    Example("a longer question than the others", "", "yes", rejected="no"),
]


def corpus(examples=EXAMPLES, max_length: int = 96) -> TokenisedCorpus:
    from tests.helpers import tiny

    return TokenisedCorpus(encode(examples, Template.choose(tiny.tokenizer(), "plain", None), max_length))


def objective(smoothing: float = 0.0, beta: float = BETA) -> Dpo:
    return Dpo(TrainConfig(objective="dpo", dpo_beta=beta, dpo_smoothing=smoothing))


def losses_of(model: AdaptedModel, made: Dpo, indices=(0, 1, 2), packed: bool = True) -> torch.Tensor:
    made.prepare(model, corpus(), indices, packed)
    return unit_losses(model, made.batch(corpus(), indices, packed=packed, pad=0))


def log_probability(module, sequence: TokenSequence) -> torch.Tensor:
    """Σ log p of the answer's tokens, from all logits of one unpadded forward."""
    ids = torch.as_tensor(sequence.ids.astype("int64"))[None]
    logits = module(input_ids=ids).logits[0][-ids.shape[1] :].log_softmax(-1)
    return torch.stack([logits[t - 1, ids[0, t]] for t in range(sequence.prompt, len(sequence))]).sum()


def by_hand(variant: str, model: AdaptedModel, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(the three pairs' losses, the gradient of their mean) from peft's model and a base of its own."""
    wrapped, parameters = plain_peft(variant, model, "llama")
    base, found = base_model(), []
    for i in range(3):
        preferred, rejected = corpus().pair(i)
        with torch.no_grad():
            known = log_probability(base, preferred), log_probability(base, rejected)
        h = BETA * ((log_probability(wrapped, preferred) - known[0]) - (log_probability(wrapped, rejected) - known[1]))
        found.append(-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h))
    losses = torch.stack(found)
    losses.mean().backward()
    return losses.detach(), torch.cat([parameters[n].grad.flatten() for n in model.adapter.layout.names])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_first_gradient_are_those_of_dpo_by_hand(variant, packed):
    """For every PEFT method: the reference is the base itself, whose second copy only this test holds."""
    model = moved(attached(variant))
    losses = losses_of(model, objective(), packed=packed)
    losses.mean().backward()
    expected, gradient = by_hand(variant, model)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert float((model.grad - gradient).norm()) <= 1e-5 * float(gradient.norm())
    assert float((losses.detach() - math.log(2)).abs().min()) > 1e-3  # this adapter is no longer the base


def test_smoothing_is_a_share_of_labels_the_wrong_way_round():
    model = moved(attached("lora"))
    expected, _ = by_hand("lora", model, smoothing=0.2)
    assert torch.allclose(losses_of(model, objective(0.2)), expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "full", "ia3"])
def test_a_fresh_adapter_has_the_loss_of_a_coin(variant):
    assert torch.allclose(losses_of(attached(variant), objective()), torch.full((3,), math.log(2)), atol=1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_what_nothing_has_changed_wins_half_and_not_by_rounding(packed):
    """Held-out margins are 0 to the last bit, whatever else is in a batch."""
    pairs = preferences.random_pairs(40)
    for variant in ("lora", "dora", "ia3", "full"):
        sums = objective().sums(attached(variant), pairs, range(40), batch_size=24, packed=packed)
        assert sums["margin_sum"] == 0.0 and sums["preferred"] == 20.0
        assert sums["preference_loss_sum"] == pytest.approx(40 * math.log(2), abs=1e-12)


def test_held_out_references_are_remembered(monkeypatch):
    made, model = objective(), moved(attached("lora"))
    once = made.sums(model, corpus(), range(3), batch_size=4, packed=True)
    monkeypatch.setattr(objectives, "reference", None)  # nothing is computed again
    assert made.sums(model, corpus(), range(3), batch_size=4, packed=True) == once


def test_swapped_answers_have_the_opposite_margin():
    model = moved(attached("lora"))
    swapped = [Example(e.instruction, e.input, e.rejected, rejected=e.output) for e in EXAMPLES]
    options = {"batch_size": 4, "packed": True}
    there = objective().sums(model, corpus(), range(3), **options)
    back = objective().sums(model, corpus(swapped), range(3), **options)
    assert there["margin_sum"] == pytest.approx(-back["margin_sum"], abs=1e-5)
    assert there["preferred"] + back["preferred"] == 3


def test_sums_are_those_of_the_losses_however_they_are_batched():
    model = moved(attached("lora"))
    losses = losses_of(model, objective())
    for size in (1, 2, 8):
        sums = objective().sums(model, corpus(), range(3), batch_size=size, packed=True)
        assert sums["preference_loss_sum"] == pytest.approx(float(losses.detach().sum()), abs=1e-5)
        assert sums["pairs"] == 3
        h = -torch.log(torch.expm1(losses.detach().double()))  # L = log(1 + e^−h)
        assert sums["margin_sum"] == pytest.approx(float(h.sum()), abs=1e-4)
        assert sums["preferred"] == int((losses < math.log(2)).sum())


def test_the_reference_is_the_base_without_its_delta_and_leaves_everything_as_it_was():
    model = moved(attached("lora"))
    made = objective()
    made.prepare(model, corpus(), [0, 1, 2], True)
    name = next(n for n in model.base_weights() if n.endswith("q_proj.weight"))
    model.set_base_delta({name: torch.full_like(model.base_weights()[name], 0.1)})
    state = {n: t.detach().clone() for n, t in model.base.model.state_dict().items()}
    flat, tokens = model.adapter.flat.clone(), losses_of(model, made)
    again = objective()
    again.prepare(model, corpus(), [0, 1, 2], True)
    assert again._known == made._known
    assert torch.equal(model.adapter.flat, flat)
    assert all(torch.equal(t, state[n]) for n, t in model.base.model.state_dict().items())
    assert torch.equal(losses_of(model, made), tokens)


def test_no_second_model():
    model = attached("lora")
    before = sum(p.numel() for p in model.module.parameters())
    made = objective()
    losses_of(model, made)
    assert sum(p.numel() for p in model.module.parameters()) == before
    assert [len(v) for v in made._known.values()] == [2, 2, 2]  # two numbers a pair, and that is all that it keeps


def test_a_reference_does_not_depend_on_what_else_is_asked():
    model = moved(attached("lora"))
    alone, all_at_once = objective(), objective()
    assert alone.prepare(model, corpus(), [1], True) > 0  # operations, which the round's cost counts
    assert alone.prepare(model, corpus(), [1], True) == 0
    all_at_once.prepare(model, corpus(), [2, 1, 0, 1], True)
    assert alone._known[1] == all_at_once._known[1]


def test_both_answers_lose_their_end_and_the_prompt_is_one():
    example = Example("q" * 40, "", "a" * 60, rejected="b" * 70)
    preferred, rejected = corpus([example], 48).pair(0)
    assert preferred.prompt == rejected.prompt == 48 - MIN_ANSWER
    assert (preferred.ids[: preferred.prompt] == rejected.ids[: rejected.prompt]).all()
    assert len(preferred) == len(rejected) == 48
    assert (preferred.ids[preferred.prompt :] != rejected.ids[rejected.prompt :]).all()


# ------------------------------------------------------------------ in a run


@pytest.fixture
def pairs_recipe(tiny_recipe, tiny_data, tmp_path):
    """Every row's answer is preferred to the same word, so that what is learned holds for other rows too."""
    import json

    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    paired = [{**row, "rejected": "zzzz"} for row in rows]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in paired))

    def make(algorithm="fedavg", **values) -> Recipe:
        return tiny_recipe({"data.path": str(path), "train.objective": "dpo", "algorithm": algorithm, **values})

    return make


@pytest.mark.parametrize("algorithm", ["fedavg", "flora", "fedprox", "pfedme", "fedkseed"])
def test_any_algorithm_learns_to_prefer(algorithm, pairs_recipe, tmp_path):
    """`local_loss` is each algorithm's own; none has a line about preferences."""
    slow = algorithm == "fedkseed"
    more = {"train.steps": 8, "train.batch_size": 8, "train.lr": 1e-3 if slow else 1e-2}
    result = run(pairs_recipe(algorithm, **more), out=tmp_path / "run").summary["preference"]
    assert result["loss"]["before"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["loss"]["after"] < result["loss"]["before"] - (0 if slow else 0.01)
    assert result["pairs"] == 12
    assert slow or result["accuracy"]["after"] > 0.5
    assert slow or result["margin"]["after"] > 0


def test_accumulation_equals_the_large_batch(pairs_recipe, tmp_path):
    large = run(pairs_recipe(**{"train.batch_size": 4}), out=tmp_path / "a").summary
    small = run(pairs_recipe(**{"train.batch_size": 2, "train.accumulation": 2}), out=tmp_path / "b").summary
    assert small["preference"]["loss"]["after"] == pytest.approx(large["preference"]["loss"]["after"], abs=1e-5)


def test_a_resumed_run_computes_its_references_anew_and_ends_with_the_same_bits(pairs_recipe, tmp_path):
    constant = {"train.schedule": "constant"}
    expected = run(pairs_recipe("fedex_lora", **constant, **{"federation.rounds": 3}), out=tmp_path / "w").summary
    run(pairs_recipe("fedex_lora", **constant), out=tmp_path / "r")
    resumed = run(
        pairs_recipe("fedex_lora", **constant, **{"federation.rounds": 3}), out=tmp_path / "r", resume=True
    ).summary
    assert resumed["adapter_sha256"] == expected["adapter_sha256"]
    assert resumed["preference"] == expected["preference"]


def test_data_without_rejected_answers_are_refused_and_pairs_can_be_learned_as_answers(
    tiny_recipe, pairs_recipe, tmp_path
):
    with pytest.raises(UserError, match="fed-preferences"):
        run(tiny_recipe({"train.objective": "dpo"}), out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="clients of fedot do not have"):
        run(tiny_recipe({"train.objective": "dpo", "algorithm": "fedot"}), out=tmp_path / "none")
    summary = run(pairs_recipe(**{"train.objective": "sft"}), out=tmp_path / "sft").summary
    assert summary["preference"] is None


def test_what_is_no_pair_is_left_out_under_dpo_alone():
    said = []
    rejected = ("b", "", "a", " ", "c")
    mixed = Corpus(
        "mixed", tuple(Example("q", "", "a", rejected=r) for r in rejected), "", "", dropped={"empty_answer": 1}
    )
    with heard_by(said.append):
        pairs = for_objective(mixed, "dpo")
    assert [e.rejected for e in pairs.examples] == ["b", "c"]
    assert pairs.dropped == {"empty_answer": 1, "empty_rejected_answer": 2, "rejected_is_the_answer": 1}
    assert len(said) == 2
    with heard_by(said.append):
        answers = for_objective(mixed, "sft")
    assert answers.examples == (Example("q", "", "a"),) * 5 and len(said) == 2
    with pytest.raises(UserError, match="has none"):
        for_objective(answers, "dpo")


def test_a_run_is_evaluated_by_its_preferences(pairs_recipe, tmp_path):
    measured = {}
    for method in ("lora", "full"):
        summary = run(
            pairs_recipe("flora" if method == "lora" else "fedavg", **{"adapter.method": method}), out=tmp_path / method
        ).summary
        measured[method] = evaluate(str(tmp_path / method), None, {}, None)["preference"]
        if method == "lora":
            for key in ("accuracy", "loss", "margin"):
                assert measured[method][key] == pytest.approx(summary["preference"][key]["after"], abs=1e-5)
    assert measured["full"] is None  # its base is gone
