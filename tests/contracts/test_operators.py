"""What holds for every operator and every chain, whatever the payload: the round trip, the bound, the meta, the integers."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloom.messages import wire
from fedloom.messages.operators.base import CannotEncode
from fedloom.messages.operators.chain import Chain
from fedloom.messages.types import Payload, Update
from tests.helpers.payloads import (
    FLOATS,
    LOSSLESS,
    LOSSY,
    bits,
    chain_of,
    chains,
    name_of,
    of,
    payloads,
    registered,
    same,
)

EVERY = LOSSLESS + LOSSY
few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def sent(chain: Chain, payload: Payload, reference=None, residual=None, seed: int = 0) -> Payload:
    """Through the operators, over the wire and back."""
    coded = chain.encode(payload, torch.Generator().manual_seed(seed), reference, residual)
    message = wire.encode_outcome(Update("a", 1, coded))
    got = wire.decode_outcome(message)
    assert isinstance(got, Update)
    return chain.decode(got.payload, reference)


def test_every_registered_operator_is_tried_here():
    assert {d if isinstance(d, str) else d["name"] for d in EVERY} == registered()


@pytest.mark.parametrize("described", LOSSLESS, ids=name_of)
@given(payload=payloads(finite=False), reference=payloads(finite=False))
@few
def test_lossless_operators_give_back_every_bit(described, payload, reference):
    got = sent(chain_of(described), payload, reference.tensors)
    assert same(got.tensors, payload.tensors)
    assert got.meta == payload.meta
    assert got.coding is None


@given(chain=chains(LOSSLESS), payload=payloads(finite=False), reference=payloads(finite=False))
@settings(few, max_examples=40)
def test_lossless_chains_give_back_every_bit(chain, payload, reference):
    assert chain.lossless
    assert same(sent(chain, payload, reference.tensors).tensors, payload.tensors)


def largest(payload: Payload) -> float:
    sizes = [float(t.double().abs().max()) for t in payload.tensors.values() if t.dtype in FLOATS and t.numel()]
    return max(sizes, default=0.0)


def check_bound(chain: Chain, payload: Payload, got: Payload, start: float) -> None:
    """Each operator declares its error for inputs of a size; what it adds may make the next one's inputs larger."""
    allowed, size = 0.0, start
    for operator in chain.operators:
        error = operator.error(size)
        allowed, size = allowed + error, size + error
    for name, tensor in payload.tensors.items():
        back = got.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        if tensor.dtype not in FLOATS:
            assert bits(back) == bits(tensor), name
        elif tensor.numel():
            rounding = 2 * (size + allowed) * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).smallest_normal
            difference = float((back.double() - tensor.double()).abs().max())
            assert difference <= allowed + rounding, (name, chain.described)


@pytest.mark.parametrize("described", LOSSY, ids=name_of)
@given(payload=payloads())
@few
def test_a_lossy_operator_keeps_its_declared_error(described, payload):
    chain = chain_of(described)
    try:
        got = sent(chain, payload)
    except CannotEncode as error:  # fp16, or a rescaled fp16 tensor: a number is over the largest one
        if not re.search("over 65504|rescale", str(error)):
            raise
        return
    check_bound(chain, payload, got, largest(payload))


@given(chain=chains(), payload=payloads(), reference=payloads(), seed=st.integers(0, 99))
@settings(few, max_examples=100)
def test_a_random_chain_keeps_the_sum_of_the_declared_errors(chain, payload, reference, seed):
    try:
        got = sent(chain, payload, reference.tensors, {}, seed)
    except CannotEncode as error:  # a difference of two fp16 numbers may overflow
        if not re.search("over 65504|finite", str(error)):
            raise
        return
    start = largest(payload) + (largest(reference) if chain.needs_reference else 0.0)
    check_bound(chain, payload, got, start)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("described", LOSSY, ids=name_of)
def test_numbers_that_are_not_finite_pass_casts_and_are_refused_by_the_rest(described, special):
    payload = Payload({"w": torch.tensor([1.0, special, -2.0])})
    chain = chain_of(described)
    if name_of(described).split(",")[0] in {"cast", "bf16", "fp16"}:
        assert sent(chain, payload).tensors["w"].tolist()[1] == pytest.approx(special, nan_ok=True)
    else:
        with pytest.raises(CannotEncode, match="needs finite numbers"):
            chain.encode(payload)


def test_a_cast_does_not_make_infinities():
    for described, value in (("fp16", 7e4), ("bf16", torch.finfo(torch.float32).max)):
        with pytest.raises(CannotEncode, match="use bf16"):
            chain_of(described).encode(Payload({"w": torch.tensor([value])}))


def test_encoding_again_gives_the_same_bytes_and_another_seed_others():
    payload = Payload({"w": of(torch.float32, (40, 30)), "n": of(torch.int64, (5,))})
    for described in EVERY:
        chain = chain_of(described)
        first, again, other = (
            wire.encode_outcome(Update("a", 1, chain.encode(payload, torch.Generator().manual_seed(s), {})))
            for s in (1, 1, 2)
        )
        assert first == again, described
        random = isinstance(described, dict) and (
            "stochastic" in described.values() or "random_k" in described.values()
        )
        assert (first == other) != random, described


def test_the_payload_itself_is_not_touched():
    for described in EVERY:
        payload = Payload({"w": of(torch.float32, (40, 30)), "n": of(torch.int64, (5,))})
        before = {n: t.clone() for n, t in payload.tensors.items()}
        sent(chain_of(described), payload, before, {})
        assert same(payload.tensors, before), described


def test_a_payload_of_integers_alone_or_of_nothing_passes_every_operator():
    for described in EVERY:
        for payload in (
            Payload({"seeds": of(torch.int64, (7,)), "on": torch.tensor(True)}),
            Payload({}, {"k": 1}),
            Payload(),
        ):
            got = sent(chain_of(described), payload, {})
            assert same(got.tensors, payload.tensors)
            assert got.meta == payload.meta
