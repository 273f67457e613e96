"""Block quantisation against its definition in plain Python: scales, levels, packing, error, mean, and what it saves."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from fedloom.messages import wire
from fedloom.messages.operators.chain import Chain
from fedloom.messages.types import Payload, Update
from tests.helpers.payloads import bits, chain_of, of


def coded(values: torch.Tensor, seed: int = 0, **options) -> tuple[Payload, torch.Tensor]:
    chain = chain_of({"name": "quantize", **options})
    made = chain.encode(Payload({"w": values}), torch.Generator().manual_seed(seed))
    return made, chain.decode(made).tensors["w"]


def bf16_up(value: float) -> float:
    """The nearest bf16 away from zero, by its definition: the upper 16 bits of fp32, one more where any lower bit is set."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", (word + 0xFFFF) & 0xFFFF0000))[0]


def digits(data: bytes, base: int, each: int, count: int) -> list[int]:
    return [byte // base**place % base for byte in data for place in range(each)][:count]


PACKED = {8: (256, 1), 4: (16, 2), 2: (4, 4), "ternary": (3, 5)}
LOWEST = {8: -127, 4: -7, 2: -2, "ternary": -1}


@pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 1000])
@pytest.mark.parametrize("kind", [8, 4, 2, "ternary"])
def test_scales_and_levels_are_what_the_docstring_says(kind, count):
    values = of(torch.float32, (count,), seed=count)
    made, got = coded(values, bits=kind)
    scales = [
        struct.unpack("<f", b"\0\0" + s.to_bytes(2, "little", signed=True))[0]
        for s in made.tensors["F32.scales"].tolist()
    ]
    levels = [d + LOWEST[kind] for d in digits(bits(made.tensors["F32.codes"]), *PACKED[kind], count)]
    assert len(made.tensors["F32.codes"]) == math.ceil(count / PACKED[kind][1])
    assert len(scales) == math.ceil(count / 256)
    for at, scale in enumerate(scales):
        block = values[at * 256 : (at + 1) * 256].tolist()
        extreme = max(block, key=abs)
        if kind == "ternary":
            over = [abs(x) for x in block if abs(x) > 0.7 * sum(map(abs, block)) / len(block)]
            expected = sum(over) / len(over)
        elif kind == 2:
            expected = -extreme / 2
        else:
            expected = abs(extreme) / (127 if kind == 8 else 7)
        assert abs(scale) == pytest.approx(abs(expected), rel=2**-7)
        assert abs(scale) >= abs(expected) * (1 - 1e-7)
        assert math.copysign(1, scale) == math.copysign(1, expected)
        for x, level in zip(block, levels[at * 256 :], strict=False):
            nearest = {q: abs(x - q * scale) for q in range(LOWEST[kind], {8: 127, 4: 7, 2: 1, "ternary": 1}[kind] + 1)}
            assert nearest[level] <= min(nearest.values()) + 1e-6 * abs(x)
    assert got.tolist() == pytest.approx([level * scales[i // 256] for i, level in enumerate(levels)], rel=1e-6)


@pytest.mark.parametrize("value", [1.0, 1.0 + 2**-7, 1.0 + 2**-23, 3.14159, 1e-45, 1e-39, 3e38, 0.0])
def test_a_scale_is_rounded_away_from_zero(value):
    from fedloom.messages.operators.quantize import _round_up

    values = torch.tensor([value, -value])
    assert _round_up(values).tolist() == [bf16_up(value), -bf16_up(value)]


@pytest.mark.parametrize(("kind", "parts"), [(8, 254), (4, 14)])
def test_nearest_errs_by_half_a_scale_at_most(kind, parts):
    for seed, spread in enumerate((1.0, 1e-3, 1e-30, 1e-38, 1e4, 1e36)):
        values = of(torch.float32, (5000,), seed, spread)
        _, got = coded(values, bits=kind)
        sizes = torch.nn.functional.pad(values, (0, -5000 % 256)).view(-1, 256).abs().amax(1)
        half = (sizes.double() / parts * (1 + 2**-7) * (1 + 1e-6) + 2.0**-134).repeat_interleave(256)[:5000]
        assert bool(((got.double() - values.double()).abs() <= half).all())


def test_the_largest_number_of_all_survives():
    most = torch.finfo(torch.float32).max
    for options in ({"bits": 8}, {"bits": 4}, {"bits": 2}, {"bits": "ternary"}, {"bits": 8, "rounding": "stochastic"}):
        _, got = coded(torch.tensor([most, -most, 0.0]), **options)
        assert bool(torch.isfinite(got).all())
        assert got[0] >= 0.98 * most, options


@pytest.mark.parametrize("kind", [8, 4, "ternary"])
def test_stochastic_rounding_is_right_in_the_mean(kind):
    """20,000 draws for each of some numbers: the mean within five standard errors, and between the levels on both sides."""
    values = torch.tensor([0.003, -0.5, 0.31, 0.77, -0.9999, 1.0, 0.0])
    draws = torch.stack(
        [coded(values.repeat(2000), seed, bits=kind, rounding="stochastic", block=14000)[1] for seed in range(10)]
    )
    draws = draws.view(-1, len(values)).double()
    scale = bf16_up(1 / {8: 127, 4: 7, "ternary": 1}[kind])
    error = (draws.mean(0) - values.double()).abs()
    assert bool((error <= 5 * scale / 2 / math.sqrt(len(draws)) + 1e-7).all()), error
    assert bool(((draws - values.double()).abs() < scale * (1 + 1e-6)).all())
    _, nearest = coded(values, bits=kind)
    if kind != 8:  # which nearest rounding is not
        assert float((nearest.double() - values.double()).abs().max()) > 5 * scale / math.sqrt(len(draws))


def test_two_levels_on_one_side_of_bits_2_need_nearest_rounding():
    with pytest.raises(ValueError, match="bits=ternary"):
        coded(torch.ones(3), bits=2, rounding="stochastic")


@pytest.mark.parametrize("kind", [8, 4, 2, "ternary"])
def test_a_block_loses_less_than_it_holds(kind):
    """What error feedback needs: ‖x - Q(x)‖ < ‖x‖ for every block, one with a single large number among zeros too."""
    spiked = torch.zeros(256)
    spiked[3], spiked[9] = -5.0, 0.1
    for block in (
        spiked,
        of(torch.float32, (256,)),
        of(torch.float32, (256,)).exp(),
        torch.ones(256),
        -torch.ones(256),
    ):
        _, got = coded(block, bits=kind)
        assert float((got - block).norm()) < 0.75 * float(block.norm())


def message(payload: Payload, *described) -> bytes:
    return wire.encode_outcome(Update("a", 1, Chain.parse(described).encode(payload)))


def test_whole_messages_shrink_as_promised(smollm2_sized):
    """Names and header included. A scale for each tensor in a table with offsets gave 3.82 and 7.29."""
    plain = len(message(smollm2_sized))
    assert 0 < plain - sum(t.numel() * 4 for t in smollm2_sized.tensors.values()) < 26_000
    ratios = {k: plain / len(message(smollm2_sized, {"name": "quantize", "bits": k})) for k in (8, 4, 2, "ternary")}
    assert ratios[8] >= 3.9 and ratios[4] >= 7.5 and ratios[2] >= 14.5 and ratios["ternary"] >= 17.5, ratios


@pytest.fixture(scope="module")
def smollm2_sized() -> Payload:
    """Random numbers in the names and shapes of a rank-8 adapter on all linears of SmolLM2-135M."""
    sizes = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (576, 192), "self_attn.v_proj": (576, 192), "self_attn.o_proj": (576, 576),
             "mlp.gate_proj": (576, 1536), "mlp.up_proj": (576, 1536), "mlp.down_proj": (1536, 576)}  # fmt: skip
    tensors = {}
    for layer in range(30):
        for name, (wide, out) in sizes.items():
            tensors[f"model.layers.{layer}.{name}.lora_A.weight"] = of(torch.float32, (8, wide), layer)
            tensors[f"model.layers.{layer}.{name}.lora_B.weight"] = of(torch.float32, (out, 8), layer, 0.01)
    return Payload(tensors)


@pytest.mark.parametrize("kind", [8, 4])
def test_the_promised_error_is_met_where_a_scale_is_rounded_up_the_most(kind):
    """A scale just over 1 becomes 1 + 2⁻⁷; a value of almost half of that is rounded to nothing."""
    high = {8: 127, 4: 7}[kind]
    largest = high * (1 + 2**-22)
    values = torch.zeros(256)
    values[0], values[1] = largest, 0.5 * (1 + 2**-7) - 1e-4
    _, got = coded(values, bits=kind)
    worst = float((got - values).abs().max())
    assert worst > 0.5 * (1 + 2**-8)
    assert worst <= chain_of({"name": "quantize", "bits": kind}).operators[0].error(largest)


def test_a_number_over_the_range_of_fp32_is_refused_by_name():
    with pytest.raises(ValueError, match="a float64 number of the payload is over its range"):
        coded(torch.tensor([1.0, 1e39], dtype=torch.float64))
    with pytest.raises(ValueError, match="needs finite numbers"):
        coded(torch.tensor([1.0, float("nan")]))
    most = float(torch.finfo(torch.float32).max)
    assert coded(torch.tensor([most, -most], dtype=torch.float64))[1].dtype == torch.float64
