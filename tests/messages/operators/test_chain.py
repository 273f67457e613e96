"""Chains: what a recipe may name, error feedback's identity, and what `delta` is against."""

from __future__ import annotations

import sys

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.messages.operators.chain import Chain
from fedloom.messages.operators.channel import Chains
from fedloom.messages.types import Payload
from fedloom.recipe.recipe import Recipe
from tests.helpers.payloads import bits, chain_of, of, same

FEEDBACK = {"error_feedback": True}

# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("operators", "words"),
    [
        ({"up": ["quantise"]}, "did you mean quantize?"),
        ({"up": [{"name": "quantize", "bit": 8}]}, "operators.up: unknown option bit of quantize: did you mean bits?"),
        ({"up": [{"name": "delta", "of": 1}]}, "delta has no options"),
        ({"up": [{"name": "quantize", "bits": 3}]}, "operators.up: bits=3 is not valid for quantize"),
        ({"up": [{"name": "quantize", "block": 1}]}, "block=1"), ({"up": [{"name": "zstd", "level": 99}]}, "level=99"),
        ({"up": [{"name": "quantize", "bits": 2, "rounding": "stochastic"}]}, "bits=ternary"),
        ({"up": [{"name": "delta"}, {"name": "sparsify", "fraction": 0}]}, "fraction=0"),
        ({"up": ["zstd", "quantize"]}, "quantize comes after zstd, which leaves no floats"),
        ({"up": ["quantize", {"name": "quantize", "bits": 4}]}, "quantize comes after quantize, which leaves no floats"),
        ({"up": ["quantize", "bf16"]}, "bf16 comes after quantize, which leaves no floats"),
        ({"up": ["bf16", "delta"]}, "delta comes after bf16: put it first"),
        ({"up": ["bf16", {"name": "quantize", **FEEDBACK}]}, "set it on the first one"),
        ({"up": ["sparsify"]}, "operators.up has sparsify, which would zero most of the weights: put delta before it"),
        ({"down": ["sparsify"]}, "it belongs to operators.up, after delta"),
        ({"down": ["delta", "quantize"]}, "operators.down has delta"), ({"initial": ["delta"]}, "operators.initial has delta"),
        ({"down": [{"name": "quantize", **FEEDBACK}]}, "operators.down has error_feedback"),
        ({"initial": [{"name": "fp16", **FEEDBACK}]}, "operators.initial has error_feedback"),
        ({"up": ["bf16"] * 17}, "at most 16 may"), ({"up": ["fp16", {}]}, "operators.up.1.name"), ({"sideways": []}, "operators.sideways"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_sentence(operators, words):
    with pytest.raises(UserError) as error:
        Chains.of(Recipe.parse({"operators": operators}).operators)
    assert words in str(error.value)


def test_names_and_mappings_mean_the_same_and_are_read_back():
    recipe = Recipe.parse(
        {"operators": {"up": ["delta", "zstd"], "down": "bf16", "initial": [{"name": "quantize", "bits": 8}]}}
    )
    assert Recipe.parse(recipe.resolved()) == recipe
    chains = Chains.of(recipe.operators)
    assert [d["name"] for d in chains.up.described] == ["delta", "zstd"]
    assert chains.down.described == [{"name": "bf16", "error_feedback": False, "dtype": "bf16"}]
    same_again = Recipe.parse({}, {"operators.up": ["delta", {"name": "zstd"}], "operators.down": ["bf16"]})
    assert Chains.of(same_again.operators).up.described == chains.up.described


def test_a_missing_library_names_the_extra(monkeypatch):
    for name, module in (("zstd", "zstandard"), ("lz4", "lz4.frame")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf'pip install "fedloom\[{name}\]"'):
            Chain.parse([name])


def test_a_registered_operator_is_found_and_works(monkeypatch):
    from fedloom.common import registry
    from fedloom.messages.operators.base import Operator

    class Reversed(Operator):
        def layout(self, spec, exact=False):
            return spec

        def encode(self, parts, around):
            return {n: t.flip(0) for n, t in parts.items()}, {}

        def decode(self, parts, spec, notes, around):
            return {n: t.flip(0) for n, t in parts.items()}

    monkeypatch.setitem(registry.operators._targets, "reversed", Reversed)
    payload = Payload({"w": of(torch.float32, (3, 5))})
    coded = chain_of("reversed", "zstd").encode(payload)
    assert same(chain_of("reversed", "zstd").decode(coded).tensors, payload.tensors)
    assert coded.coding["operators"][0] == {"name": "reversed"}


# ------------------------------------------------------------------ error feedback

LOSSY = [
    [{"name": "quantize", "bits": 8, **FEEDBACK}], [{"name": "quantize", "bits": 4, **FEEDBACK}],
    [{"name": "quantize", "bits": 2, **FEEDBACK}], [{"name": "quantize", "bits": "ternary", **FEEDBACK}],
    [{"name": "quantize", "bits": 4, "rounding": "stochastic", **FEEDBACK}, "zstd"], [{"name": "bf16", **FEEDBACK}],
    [{"name": "sparsify", "fraction": 0.1, **FEEDBACK}], [{"name": "sparsify", "method": "random_k", **FEEDBACK}],
    [{"name": "sparsify", "fraction": 0.1, **FEEDBACK}, "quantize", "deflate"],
    [{"name": "cast", "dtype": "fp16", **FEEDBACK}, {"name": "quantize", "bits": 4}],
]  # fmt: skip


@pytest.mark.parametrize("described", LOSSY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrived_and_what_is_kept_add_up_to_what_was_sent(described, dtype):
    chain, residual = chain_of(*described), {}
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(40, 30, dtype=torch.float64)
    arrived = total.clone()
    for round in range(12):
        x = of(dtype, (40, 30), seed=round)
        got = chain.decode(chain.encode(Payload({"w": x, "n": torch.arange(3)}), generator, residual=residual))
        total += x.double()
        arrived += got.tensors["w"].double()
        assert set(residual) == {"w"} and residual["w"].dtype == torch.float32
        rounding = 12 * 2**-23 * float(total.abs().max())
        assert float((arrived + residual["w"].double() - total).abs().max()) <= rounding, round
    lossless_here = described[0]["name"] == "bf16" and dtype == torch.bfloat16
    assert bool(residual["w"].any()) != lossless_here


def test_without_feedback_the_error_stays_and_with_it_the_mean_is_right():
    """The same numbers sent 50 times as 2 bits: without feedback each round loses the same."""
    x = of(torch.float32, (2000,))

    def mean(**options) -> torch.Tensor:
        chain, residual = chain_of({"name": "quantize", "bits": 2, **options}), {}
        sent = [chain.decode(chain.encode(Payload({"w": x}), residual=residual)).tensors["w"] for _ in range(50)]
        return torch.stack(sent).double().mean(0)

    without, with_it = (float((m - x).norm() / x.norm()) for m in (mean(), mean(error_feedback=True)))
    assert without > 0.3 and with_it < 0.03, (without, with_it)


def test_names_that_come_and_go_keep_what_is_theirs():
    """Algorithms that send one factor in one round and the other in the next, or another shape after pruning."""
    chain, residual = chain_of({"name": "quantize", "bits": 4, **FEEDBACK}), {}
    a, b = of(torch.float32, (300,)), of(torch.float32, (4, 5), seed=1)
    chain.encode(Payload({"a": a}), residual=residual)
    kept = residual["a"].clone()
    chain.encode(Payload({"b": b}), residual=residual)
    assert torch.equal(residual["a"], kept) and set(residual) == {"a", "b"}
    chain.encode(Payload({"b": b[:2]}), residual=residual)
    assert residual["b"].shape == (2, 5)
    fresh: dict[str, torch.Tensor] = {}
    chain.encode(Payload({"b": b[:2]}), residual=fresh)
    assert torch.equal(residual["b"], fresh["b"])  # what was kept of another shape does not count


# ------------------------------------------------------------------ delta


def test_a_lossy_delta_loses_in_proportion_to_the_difference():
    base = {"w": of(torch.float32, (64, 64)), "seeds": torch.arange(5)}
    moved = {"w": base["w"] + 1e-3 * of(torch.float32, (64, 64), seed=1), "seeds": torch.arange(5) * 3}
    errors = {}
    for described in (["quantize"], ["delta", "quantize"]):
        chain = chain_of(*described)
        got = chain.decode(chain.encode(Payload(moved), reference=base), base).tensors
        errors[len(described)] = float((got["w"] - moved["w"]).norm())
        assert torch.equal(got["seeds"], moved["seeds"])
    assert errors[2] < errors[1] / 500


def test_what_the_broadcast_does_not_have_travels_as_it_is():
    base = {
        "same": torch.ones(4),
        "other_shape": torch.ones(2, 2),
        "other_dtype": torch.ones(4, dtype=torch.float64),
        "gone": torch.ones(9),
    }
    sent = {
        "same": torch.full((4,), 2.0),
        "other_shape": torch.full((4,), 2.0),
        "other_dtype": torch.full((4,), 2.0),
        "new": torch.full((4,), 2.0),
    }
    coded = chain_of("delta", "bf16").encode(Payload(sent), reference=base)
    assert coded.tensors["F32"].tolist() == [2.0] * 4 + [2.0] * 4 + [2.0] * 4 + [1.0] * 4
    assert same(chain_of("delta", "bf16").decode(coded, base).tensors, sent)


def test_an_exact_delta_of_equal_payloads_is_zero_bits_and_reconstructs_where_subtraction_does_not():
    base = {"w": torch.tensor([1e8, 1.0, -0.0, float("nan")])}
    sent = {"w": torch.tensor([0.1, 1.0 + 2**-23, 0.0, float("nan")])}
    assert bits((sent["w"] - base["w"]) + base["w"]) != bits(sent["w"])
    coded = chain_of("delta").encode(Payload(sent), reference=base)
    assert same(chain_of("delta").decode(coded, base).tensors, sent)
    nothing = chain_of("delta").encode(Payload(base), reference=base)
    assert not nothing.tensors["F32"].any()


# ------------------------------------------------------------------ what each operator says of itself


def test_which_operators_lose_something_and_which_are_for_differences():
    """Whether a difference is one of bits or of numbers follows from it, and what the server holds as a reference."""
    from fedloom.common import registry

    operators = {name: registry.operators.get(name) for name in registry.operators.names()}
    assert {n for n, o in operators.items() if not o.lossless} == {"bf16", "cast", "fp16", "quantize", "sparsify"}
    assert {n for n, o in operators.items() if o.for_differences} == {"sparsify"}
    assert {n for n, o in operators.items() if o.needs_reference} == {"delta"}


@pytest.mark.parametrize("lossy", ["bf16", "fp16", "cast", "quantize", "sparsify"])
def test_before_a_lossy_operator_a_difference_is_one_of_numbers(lossy):
    base = {"w": torch.full((4000,), 100.0)}
    chain = chain_of("delta", lossy)
    assert not chain.lossless and chain_of("delta", "zstd").lossless
    change = 127 / 256  # no operator here has to round it
    coded = chain.encode(Payload({"w": base["w"] + change}), reference=base)
    assert sum(t.nbytes for t in coded.tensors.values()) <= 8000 + 32
    got = chain.decode(coded, base).tensors["w"] - base["w"]
    assert set(got.tolist()) <= {0.0, change} and change in got


def test_a_residual_of_a_name_that_holds_integers_now_stays_as_it_is():
    chain, residual = chain_of({"name": "quantize", "bits": 4, **FEEDBACK}), {}
    chain.encode(Payload({"w": of(torch.float32, (300,))}), residual=residual)
    kept = residual["w"].clone()
    sent = {"w": torch.arange(300), "v": of(torch.float32, (8,))}
    got = chain.decode(chain.encode(Payload(sent), residual=residual)).tensors
    assert torch.equal(got["w"], sent["w"]) and torch.equal(residual["w"], kept)
