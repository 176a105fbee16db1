"""Codes by the compiled loops against those by torch's operators, bit for bit."""

from itertools import accumulate

import pytest
import torch

from fxmem.codes import bits, derivatives, narrow_floats, native, packing, pools, quantizers
from fxmem.graphs.activations import ACTIVATIONS
from fxmem.graphs.measure import cpu_allocations
from fxmem.graphs.workspace import Call

compiled = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


def samples():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5003, generator=generator)
    yield normal
    yield normal / normal.flip(0)  # heavy tails
    yield normal.relu()[: 16 * 61]
    yield normal.clone().index_fill_(0, torch.arange(0, 200), 2.5)  # groups of one value
    for wild in (torch.nan, torch.inf, -torch.inf):
        yield normal.clone().index_fill_(0, torch.arange(0, 4000, 700), wild)
    for scale in (1e-44, 1e-37, 1e37, 3e38, 1e4):
        yield normal * scale
    yield normal + 1e5
    yield normal[:1]
    yield normal[:0]


SEEDS = [None, *((torch.tensor(value), stream) for value, stream in ((3, 0), (-(1 << 40), 7)))]


def same(left, right):
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@compiled
@pytest.mark.parametrize("given", SEEDS, ids=str)
@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_have_the_bits_of_torchs_operators(bits, group, given):
    seed, stream = given or (None, 0)
    for x in samples():
        code = quantizers.quantize_by_torch(x, bits, group, seed, stream)
        assert same(code, quantizers._quantize_natively(x, bits, group, seed, stream))
        how = (bits, group, list(x.shape), list(x.stride()), x.dtype)
        back = quantizers.dequantize_by_torch(code, *how)
        assert same(back, quantizers._dequantize_natively(code, *how))


@compiled
@pytest.mark.parametrize("given", SEEDS, ids=str)
def test_blocks_have_the_bits_of_torchs_operators(given):
    seed, stream = given or (None, 0)
    for x in samples():
        code = narrow_floats.quantize_by_torch(x, "mxfp4", seed, stream)
        assert same(code, narrow_floats._quantize_natively(x, "mxfp4", seed, stream))
        how = ("mxfp4", list(x.shape), list(x.stride()), x.dtype)
        back = narrow_floats.dequantize_by_torch(code, *how)
        assert same(back, narrow_floats._dequantize_natively(code, *how))


@compiled
@pytest.mark.parametrize("given", SEEDS, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_derivatives_have_the_bits_of_torchs_operators(activation, bits, given):
    seed, stream = given or (None, 0)
    for x in samples():
        how = (activation, bits, seed, stream)
        code = derivatives.encode_by(derivatives._round_by_torch, x, *how)
        assert same(code, derivatives.encode_by(derivatives._round_natively, x, *how))
        grad = x.flip(0).contiguous()
        found = [
            multiplied(grad, code, activation, bits, torch.empty_like(grad))
            for multiplied in (derivatives._multiply_by_torch, derivatives._multiply_natively)
        ]
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@compiled
@pytest.mark.parametrize("n", range(len(list(samples()))))
def test_bits_and_what_reads_them_are_those_of_torchs_operators(n):
    x = list(samples())[n]
    for left, right in bits._compared(x):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        assert same(left.signbit(), right.signbit()) or left.isnan().any()


WINDOWS = [
    native.Window([2, 2], [2, 2], [0, 0], [1, 1]),
    native.Window([3, 3], [2, 1], [1, 1], [1, 1]),
    native.Window([3, 2], [1, 3], [1, 0], [2, 3]),
    native.Window([16, 16], [1, 1], [8, 8], [1, 1]),
    native.Window([1, 5], [1, 2], [0, 2], [1, 1]),
]


@compiled
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pools_have_the_bits_of_torchs_operators(window):
    x = torch.randn(2, 3, 17, 19, generator=torch.Generator().manual_seed(0))
    x[:, :, 3:9, 4:15] = 1.0  # windows with more than one largest element
    for seen in (x, x.contiguous(memory_format=torch.channels_last), x[0], x[:0]):
        assert pools._agrees_on(seen, window)


@compiled
def test_bits_that_are_others_are_seen(monkeypatch):
    """What is tried once on each machine would see it."""
    assert bits._native_agrees(torch.device("cpu"))
    monkeypatch.setattr(
        bits.native, "pack_positive", lambda x, code: bits.native.pack_above(x, 0.0, code)
    )
    assert not bits._native_agrees(torch.device("cpu"))


@compiled
def test_float32_on_the_cpu_goes_by_the_loops(monkeypatch):
    x = torch.randn(640)
    assert packing.is_proven(quantizers._native_agrees, x.device)
    monkeypatch.setattr(quantizers, "quantize_by_torch", None)
    quantizers.quantize_groups(x, 4, 64, torch.tensor(1), 0)
    with pytest.raises(TypeError):
        quantizers.quantize_groups(x.bfloat16(), 4, 64, torch.tensor(1), 0)


def test_without_a_compiler_torchs_operators_run(monkeypatch, tmp_path):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "/nowhere/cc")
    native.library.cache_clear()
    try:
        assert native.library() is None
        x = torch.randn(640)
        code = quantizers.quantize_groups(x, 4, 64, torch.tensor(1), 0)
        assert same(code, quantizers.quantize_by_torch(x, 4, 64, torch.tensor(1), 0))
        assert not list(tmp_path.iterdir())
    finally:
        native.library.cache_clear()


@compiled
def test_what_is_known_of_an_operator_is_of_the_code_that_it_runs(monkeypatch):
    """What one code holds in memory says nothing of another."""
    call = Call.of(torch.ops.fxmem.quantize_groups.default, (torch.randn(640), 4, 64, None, 0), {})
    known = set()
    for setting in ("1", "0"):
        monkeypatch.setenv("FXMEM_NATIVE", setting)
        native.library.cache_clear()
        native.implementation.cache_clear()
        known.add(call.signature)
    native.library.cache_clear()
    native.implementation.cache_clear()
    assert len(known) == 2
    aten = Call.of(torch.ops.aten.relu.default, (torch.randn(4),), {})
    assert aten.signature.startswith("aten.relu.default(")


@compiled
def test_loops_that_give_other_bits_are_not_used():
    def differs(device):
        return False

    with pytest.warns(UserWarning, match="other bits"):
        assert not native.on_native(torch.randn(640), differs)


@compiled
def test_loops_are_proven_before_what_they_hold_is_measured():
    """Comparing them holds bytes that no later call does."""
    x, seed = torch.randn(640), torch.tensor(1)
    op = torch.ops.fxmem.quantize_groups.default
    packing.is_proven.cache_clear()
    native.implementation.cache_clear()
    assert Call.of(
        op, (x, 4, 64, seed, 0), {}
    ).signature  # what is known of an operator is under it
    first, second = (cpu_allocations(lambda: op(x, 4, 64, seed, 0))[0] for _ in range(2))
    assert max(accumulate(first)) == max(accumulate(second))
