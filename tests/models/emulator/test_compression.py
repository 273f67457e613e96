"""How weights travel: what a client reads is what alignment trained with, errors are within their bounds, bytes are counted."""

from __future__ import annotations

import pytest
import torch

from fedloom.common.errors import UserError
from fedloom.models.emulator.compression import (
    BLOCK,
    Factored,
    Quantised,
    dequantise,
    factorise,
    make_compression,
    pack_nibbles,
    quantise,
    unpack_nibbles,
)

KINDS = [("drop_layers", 8, 0.3), ("quantize", 8, 0.3), ("quantize", 4, 0.3), ("low_rank", 8, 0.3)]


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = {"a.weight": torch.randn(24, 40, generator=draw), "b.weight": torch.randn(33, 7, generator=draw)}
    return {**made, "a.bias": torch.randn(24, generator=draw), "norm.weight": torch.ones(40)}


def shapes() -> dict[str, torch.Size]:
    return {n: t.shape for n, t in weights().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bits", "share"), KINDS)
def test_a_client_reads_what_the_server_renders_bit_for_bit(kind, bits, share, dtype):
    compression = make_compression(kind, dtype, bits, share)
    latents = compression.latents({n: w.to(dtype) for n, w in weights().items()})
    read = compression.decode(compression.encode(latents), shapes())
    rendered = compression.render(latents)
    assert read.keys() == rendered.keys() == weights().keys()
    assert all(torch.equal(read[n], rendered[n]) and read[n].dtype == dtype for n in read)
    assert torch.equal(read["a.bias"], weights()["a.bias"].to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_within_half_a_step_of_its_block(bits):
    weight = weights()["a.weight"] * torch.logspace(-3, 2, 24)[:, None]  # blocks of very different size
    whole, scale = quantise(weight, bits)
    largest = 2 ** (bits - 1) - 1
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    assert torch.allclose(scale, flat.abs().amax(1) / largest)  # closed form
    back = torch.nn.functional.pad(dequantise(whole, scale, weight.shape).flatten(), (0, -weight.numel() % BLOCK))
    error = (back.view(-1, BLOCK) - flat).abs()
    assert bool((error <= scale[:, None] * (0.5 + 1e-4)).all())
    assert float(error.max() / scale.max()) > 0.3  # it does round
    assert int(whole.abs().max()) == largest


def test_a_block_of_zeros_stays_zero():
    whole, scale = quantise(torch.zeros(3, 5), 8)
    assert not whole.any() and not dequantise(whole, scale, torch.Size([3, 5])).isnan().any()


def test_two_four_bit_numbers_share_a_byte():
    whole = torch.arange(-7, 9).clamp(max=7).to(torch.int8)
    packed = pack_nibbles(whole)
    assert packed.dtype == torch.uint8 and packed.numel() == whole.numel() // 2
    assert torch.equal(unpack_nibbles(packed), whole)


@pytest.mark.parametrize(("bits", "smallest"), [(8, 3.7), (4, 7.0)])
def test_quantised_weights_take_as_few_bytes_as_they_say(bits, smallest):
    large = {"w": torch.randn(256, 256)}
    compression = Quantised(torch.float32, bits)
    wire = compression.encode(compression.latents(large))
    blocks = 256 * 256 // BLOCK
    assert sum(t.nbytes for t in wire.values()) == 256 * 256 * bits // 8 + 4 * blocks
    assert large["w"].nbytes / sum(t.nbytes for t in wire.values()) > smallest


def test_factors_at_full_rank_are_the_weight_and_below_it_the_best():
    weight = weights()["a.weight"]
    full = factorise(weight, 24)
    assert torch.allclose(full.b @ full.a, weight, atol=1e-5)
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 7, 23):
        low = factorise(weight, rank)
        assert low.b.shape == (24, rank) and low.a.shape == (rank, 40)
        gap = torch.linalg.matrix_norm((low.b.double() @ low.a.double()) - weight.double())
        assert float(gap) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-5)  # Eckart–Young


def test_factors_travel_as_factors():
    compression = Factored(torch.float32, 0.25)
    wire = compression.encode(compression.latents(weights()))
    assert {n: tuple(t.shape) for n, t in wire.items() if n.startswith("a.weight")} == {
        "a.weight/A": (6, 40),
        "a.weight/B": (24, 6),
    }
    assert compression.count_numbers(wire, shapes()) == 6 * 64 + 2 * 40 + 24 + 40
    with pytest.raises(UserError, match=r"algorithm.keep_rank=0.9 makes factors of .* which saves nothing"):
        Factored(torch.float32, 0.9).check(shapes())


@pytest.mark.parametrize(("kind", "bits", "share"), KINDS)
def test_what_is_missing_or_misshapen_is_refused(kind, bits, share):
    compression = make_compression(kind, torch.float32, bits, share)
    wire = compression.encode(compression.latents(weights()))
    name = next(n for n in wire if n.startswith("a.weight"))
    with pytest.raises(ValueError, match="has no tensor"):
        compression.decode({n: t for n, t in wire.items() if n != name}, shapes())
    with pytest.raises(ValueError, match="has the shape"):
        compression.decode({**wire, name: wire[name].flatten()[:-2]}, shapes())


@pytest.mark.parametrize(("kind", "bits", "share"), KINDS)
def test_a_loss_on_what_is_rendered_reaches_every_latent(kind, bits, share):
    compression = make_compression(kind, torch.float32, bits, share)
    latents = {n: t.requires_grad_(True) for n, t in compression.latents(weights()).items()}
    rendered = compression.render(latents)
    sum(w.square().sum() for w in rendered.values()).backward()
    assert all(t.grad is not None and t.grad.any() for t in latents.values())
    if kind == "quantize":  # straight through: the gradient at the rounded weight
        assert torch.equal(latents["a.weight"].grad, 2 * rendered["a.weight"].detach())
