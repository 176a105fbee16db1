"""Lossy encodings: errors against their formulas, means over seeds, bytes, layouts and bad input."""

import dataclasses
import itertools
import math

import pytest
import torch

import fxmem
from fxmem.basics import noise
from fxmem.basics.errors import EncodingError
from fxmem.basics.sizes import by_stride
from fxmem.codes import derivatives, lossy, narrow_floats, native, packing, quantizers
from fxmem.codes.encoding_trials import check_encoding
from fxmem.codes.lossy import DERIVATIVES, LOSSY
from fxmem.codes.packing import FLOATS, is_proven
from fxmem.graphs.activations import ACTIVATIONS, activation_of

aten = torch.ops.aten

DERIVED = list(itertools.chain(*DERIVATIVES.values()))
ALL = [*LOSSY, *DERIVED]
UNBIASED = [e for e in ALL if e.unbiased]
INTEGERS = [e for e in LOSSY if e.encoder is quantizers.quantize_groups]
BY_NAME = {e.name: e for e in ALL}

SHAPES = [(), (0,), (3, 0, 2), (1,), (15,), (64,), (65,), (3, 5, 7, 11), (2, 3, 201, 101)]
"""Empty, single, whole groups, odd tails, and more than is worked on at a time."""

each = pytest.mark.parametrize("encoding", ALL, ids=lambda e: e.name)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def seed(value=1):
    return torch.tensor(value)


def normal(shape, dtype=torch.float32, channels_last=False, at=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(at)).to(dtype)
    four = channels_last and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if four else x


def heavy_tailed(shape, dtype=torch.float32):
    """Student's t of three degrees of freedom."""
    normals = torch.randn((4, *shape), generator=torch.Generator().manual_seed(0))
    return (normals[0] / normals[1:].square().mean(0).sqrt()).to(dtype)


def what_is_coded(encoding, x):
    """In float64: the tensor, or the derivative at it."""
    activation = ACTIVATIONS.get(encoding.settings[0])
    return activation.derivative(x.double()) if activation else x.double()


def saved(encoding, x):
    """A tensor that a backward may save: of tanh and sigmoid the result."""
    name = encoding.settings[0]
    return getattr(torch, name)(x) if name in ("tanh", "sigmoid") else x


def errors(encoding, x, draws, stream=0, seeded=True):
    """Of so many seeds, in float64.  Without seeds: rounded to the nearest."""
    want = what_is_coded(encoding, x)
    for n in range(draws):
        given = encoding.to_encode(x, seed(n) if seeded else None, stream)
        yield encoding.decode(encoding.encoder(*given), x).double() - want


# -- Bytes and layouts -------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("channels_last", [False, True])
@each
def test_bytes_are_as_stated_and_layouts_come_back(encoding, channels_last, dtype):
    for shape in SHAPES:
        x = saved(encoding, normal(shape, dtype, channels_last))
        code = encoding.encode(x, seed())
        assert code.untyped_storage().nbytes() == encoding.nbytes.subs(fxmem.ELEMENTS, x.numel())
        before = code.clone()
        back = encoding.decode(code, x)
        assert torch.equal(code, before)
        assert (back.shape, back.stride(), back.dtype) == (x.shape, x.stride(), dtype)
        error = (back - what_is_coded(encoding, x)).abs()
        assert float(error.max() if x.numel() else 0.0) < 3  # a step of two bits


def test_bytes_per_element():
    million = 1 << 20
    each = {e.name: float(e.nbytes.subs(fxmem.ELEMENTS, million)) / million for e in ALL}
    assert each["int8 g256"] == 1 + 4 / 256
    assert each["int4 g64"] == each["nvfp4"] - 4 / million == 0.5625
    assert each["int2 g64"] == 0.3125
    assert each["mxfp8"] == 1 + 1 / 32
    assert each["mxfp4"] == 0.5 + 1 / 32
    assert each["e4m3 g128"] == 1 + 4 / 128
    assert each["gelu' 2"] == 0.25 + 4 / million


@each
def test_neighbours_in_memory_are_one_group(encoding):
    """Whatever the order of dimensions, the same memory has the same code."""
    x = saved(encoding, normal((6, 8, 10, 12)))
    for order in ((3, 1, 0, 2), (0, 2, 3, 1)):
        turned = x.permute(order)
        assert torch.equal(encoding.encode(turned, seed()), encoding.encode(x, seed()))
        back = encoding.decode(encoding.encode(turned, seed()), turned)
        assert back.stride() == turned.stride()
        straight = encoding.decode(encoding.encode(x, seed()), x)
        assert torch.equal(back, straight.permute(order))
        assert encoding.variance(turned).stride() == turned.stride()
        assert torch.equal(encoding.variance(turned), encoding.variance(x).permute(order))


@each
def test_a_slice_of_memory_is_read_from_its_own_beginning(encoding):
    x = saved(encoding, normal((5, 64, 3)))
    code = encoding.encode(x[2:], seed())
    assert torch.equal(code, encoding.encode(x[2:].clone(), seed()))


@each
def test_any_stretch_of_the_work_gives_the_same(encoding, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)  # which has no stretches
    x = saved(encoding, normal((3, 5, 700)))
    code = encoding.encode(x, seed(), 7)
    back, variance = encoding.decode(code, x), encoding.variance(x)
    monkeypatch.setitem(packing._STRETCH, "cpu", 1 << 9)
    assert torch.equal(encoding.encode(x, seed(), 7), code)
    assert torch.equal(encoding.decode(code, x), back)
    assert torch.equal(encoding.variance(x), variance)


# -- Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [normal, heavy_tailed], ids=lambda f: f.__name__)
@each_dtype
@each
def test_the_squared_error_is_what_the_formula_says(encoding, dtype, sample):
    x = saved(encoding, sample((64, 512), dtype))
    if encoding in DERIVED:
        dtype = torch.float32  # decoded as the backward reads it
        x = x.float()
    draws = 8 if encoding.seeded else 1
    measured = sum(float(e.square().sum()) for e in errors(encoding, x, draws)) / draws
    exact = float(encoding.variance(x).double().sum())
    if dtype not in encoding.dtypes:
        assert measured == exact
        return
    assert measured == pytest.approx(exact, rel=0.03)
    average = float(encoding.average(x).double().sum())
    assert average == pytest.approx(exact, rel=0.3 if encoding.seeded else 0.5)


@pytest.mark.parametrize("encoding", INTEGERS, ids=lambda e: e.name)
def test_the_closed_form_of_groups(encoding):
    """Relative root mean square R / ((2^b - 1) sqrt(6)), R the mean width of a group."""
    bits, group = encoding.settings
    x = normal((1024, 256))
    groups = x.view(-1, group)
    width = (groups.amax(1) - groups.amin(1)).square().mean().sqrt()
    (error,) = errors(encoding, x, 1)
    got = float(error.norm() / x.norm())
    # Two bits are too few for a flat density within a step.
    assert got == pytest.approx(
        float(width) / ((2**bits - 1) * 6**0.5), rel=0.05 if bits == 2 else 0.02
    )
    (nearest,) = errors(encoding, x, 1, seeded=False)
    assert float(nearest.norm() / x.norm()) == pytest.approx(got / 2**0.5, rel=0.05)


def _always_one(encoding, x):
    """What is rounded to the nearest has the same error in every draw."""
    (error,) = errors(encoding, x, 1, seeded=False)
    return itertools.repeat(error, 256)


def converges(encoding, x, seeded=True):
    """Is the error of the mean of R draws that of one over the root of R, R to 256?"""
    expected = float(encoding.variance(x).double().sum())
    total, close = 0.0, []
    found = errors(encoding, x, 256) if seeded and encoding.seeded else _always_one(encoding, x)
    for n, error in enumerate(found, 1):
        total = total + error
        if n in (1, 4, 16, 64, 256):
            close.append(float((total / n).square().sum()) * n / expected)
    return all(0.9 < ratio < 1.1 for ratio in close), close


@pytest.mark.parametrize("encoding", UNBIASED, ids=lambda e: e.name)
def test_the_mean_of_draws_converges(encoding):
    x = saved(encoding, normal((64, 256)))
    fine, ratios = converges(encoding, x)
    assert fine, ratios
    fine, ratios = converges(encoding, x, seeded=False)
    assert not fine, f"what is rounded to the nearest passes: {ratios}"


@pytest.mark.parametrize("encoding", [e for e in LOSSY if e.unbiased], ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mean_is_right_in_types_coarser_than_the_grid(encoding, dtype):
    x = normal((64, 256), dtype) + 3  # where bfloat16 is coarse
    fine, ratios = converges(encoding, x)
    assert fine, ratios


@pytest.mark.parametrize("encoding", [e for e in LOSSY if not e.unbiased], ids=lambda e: e.name)
def test_casts_are_not_called_unbiased(encoding):
    fine, ratios = converges(encoding, normal((32, 64)))
    assert not fine, ratios


# -- Noise -------------------------------------------------------------------------------------------


def draws(value=1, stream=0, start=0, count=1 << 16):
    return noise.Noise(seed(value), stream, torch.device("cpu")).at(start, count)


def correlation(a, b):
    """In units of what chance allows."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1]) * len(a) ** 0.5


def test_noise_is_uniform():
    u = draws()
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    counts = torch.histc(u, 256, 0, 1)
    chi = float(((counts - 256) ** 2 / 256).sum())
    assert abs(chi - 255) < 4 * (2 * 255) ** 0.5
    whole = u.double() * 2**24
    assert torch.equal(whole, whole.round())
    for bit in range(24):
        assert abs(float((whole.long() >> bit & 1).double().mean()) - 0.5) < 4 * 0.5 / len(u) ** 0.5


@pytest.mark.parametrize(
    "other",
    [{"value": 2}, {"value": -1}, {"value": 1 << 40}, {"stream": 1}, {"stream": 1 << 20}]
    + [{"start": n} for n in (1, 2, 64, 1 << 16, 1 << 32, 1 << 33)],
    ids=str,
)
def test_other_seeds_streams_and_places_have_other_noise(other):
    a, b = draws(), draws(**other)
    assert abs(correlation(a, b)) < 4
    assert abs(correlation((a - 0.5).square(), (b - 0.5).square())) < 4
    assert len(torch.cat([a, b]).unique()) > 1.98 * len(a) or "start" in other


def test_noise_is_that_of_the_place():
    assert torch.equal(draws(start=1 << 10, count=512), draws()[1 << 10 : (1 << 10) + 512])


def test_the_hash_on_paper():
    """Python's integers against tensors'."""
    low, more = (int(k) & 0xFFFFFFFF for k in noise.keys(seed(), 3, 0))
    for place in (0, 1, 12345, 2**32 - 1):
        h = place ^ low
        h = (h ^ h >> 16) * 0x7FEB352D & 0xFFFFFFFF
        h ^= more
        h = (h ^ h >> 15) * 0x846CA68B & 0xFFFFFFFF
        h ^= h >> 16
        assert float(draws(1, 3, place, 1)) == (h >> 8) / 2**24
    z = (1 + 4 * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    z = (z ^ z >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    assert (more << 32 | low) == z ^ z >> 31


@pytest.mark.parametrize("encoding", UNBIASED, ids=lambda e: e.name)
def test_the_seed_and_the_stream_say_it_all(encoding):
    x = saved(encoding, normal((64, 128)))
    code = encoding.encode(x, seed(5), 3)
    torch.manual_seed(torch.initial_seed() + 1)
    assert torch.equal(code, encoding.encode(x, seed(5).reshape(1), 3))
    assert not torch.equal(code, encoding.encode(x, seed(6), 3))
    assert not torch.equal(code, encoding.encode(x, seed(5), 4))
    # Two tensors of one step, and one tensor in two steps: errors that have nothing in common.
    (a,), (b,) = errors(encoding, x, 1, stream=0), errors(encoding, x, 1, stream=1)
    assert abs(correlation(a.flatten(), b.flatten())) < 4


# -- Groups of integers ------------------------------------------------------------------------------


def hard_groups(dtype):
    """Rows of 64: wide, narrow, far from zero, tiny, huge, one-sided, one value but one."""
    rows, base = [], normal((64,)).double()
    for middle, width in itertools.product(
        (0.0, 1.0, -1.0, 1e3, -1e3, 1e-3, 6e4, -3e4, 1e-7, 1e30, -1e30, 1e-38),
        (1.0, 1e-2, 1e-6, 1e3, 1e-30, 1e-40, 1e30, 1e4),
    ):
        rows += [middle + width * base, middle + width * base.abs()]
    rows.append(torch.tensor([1.0] * 63 + [1.0 + 2**-7]))
    found = torch.stack([row.double() for row in rows]).to(dtype)
    largest = torch.finfo(dtype).max
    return found[found.double().abs().amax(1) < 0.5 * largest]


@each_dtype
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_grids_span_their_groups(bits, dtype):
    x = hard_groups(dtype).float()
    grid = quantizers._fit(x, bits, dtype)
    first, last = grid.first * grid.step, (grid.first + (2**bits - 1)) * grid.step
    flat = grid.step == 0
    assert (flat | (first.double() <= x.amin(1, keepdim=True))).all()
    assert (flat | (last.double() >= x.amax(1, keepdim=True))).all()
    assert grid.step.isfinite().all()
    # And not by much: a point in 2^10 of the first one, and the roundings of both.
    least = x.double().amax(1, keepdim=True) - x.double().amin(1, keepdim=True)
    allowed = (least * 1.01 + x.double().abs().amax(1, keepdim=True) * 2.0**-9) / (2**bits - 1)
    allowed = torch.maximum(allowed, x.double().abs().amax(1, keepdim=True) / 6e4)
    assert (grid.step <= allowed.clamp_min(2.0**-125)).all()
    # What is stored is what was meant.
    code = quantizers.quantize_groups(x.to(dtype), bits, 64, seed(), 0)
    stored = quantizers._stored(*quantizers.parts_of(code, len(x), bits, 64))
    for kept, meant in zip(stored, grid, strict=True):
        assert torch.equal(kept, meant)


@each_dtype
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_hard_groups_are_unbiased(bits, dtype):
    x = hard_groups(dtype)
    encoding = dataclasses.replace(
        BY_NAME["int4 g64"],
        settings=(bits, 64),
        variance=lambda x: quantizers.group_variance(x, bits, 64),
    )
    total = sum(errors(encoding, x, 64))
    variance = encoding.variance(x).double()
    # By rows, for rows differ by 60 orders of magnitude; some are on the grid but for one draw in many,
    # and the rounding of float32 is left.
    step = quantizers._fit(x.float(), bits, dtype).step[:, 0].double()
    allowed = 64 * variance.sum(1) * 3 + 64 * step**2
    allowed += (64 * x.double().norm(dim=1) * 2.0**-22) ** 2
    large = step > 1e-15  # below, float32 does not hold the variance
    assert (total.square().sum(1) <= allowed)[large].all()
    assert (total.abs().amax(1) <= 64 * step).all()


@each_dtype
@pytest.mark.parametrize("encoding", INTEGERS, ids=lambda e: e.name)
def test_groups_of_one_value_are_exact(encoding, dtype):
    group = encoding.settings[1]
    values = [0.1, -3.3e4, 0.0, -1e-7, 6e-8, 65504.0, math.inf, -math.inf, 1e-42]
    x = torch.tensor(values).to(dtype)[:, None].expand(-1, group).contiguous()
    assert torch.equal(encoding.decode(encoding.encode(x, seed()), x), x)
    assert not encoding.variance(x).nan_to_num(1.0).any()
    one = x[0, :5].clone()  # a tail
    assert torch.equal(encoding.decode(encoding.encode(one, seed()), one), one)


@pytest.mark.parametrize("encoding", INTEGERS, ids=lambda e: e.name)
def test_zeros_of_what_has_no_negatives_are_exact(encoding):
    x = normal((64, 256)).relu()
    back = encoding.decode(encoding.encode(x, seed()), x)
    assert not back[x == 0].any()


@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("encoding", LOSSY, ids=lambda e: e.name)
def test_what_is_not_finite_stays_so(encoding, value, dtype):
    x = normal((1000,), dtype)
    x[700] = value
    back = encoding.decode(encoding.encode(x, seed()), x)
    assert not back[700].isfinite()
    assert back[:256].isfinite().all()
    assert back[-232:].isfinite().all()


@pytest.mark.parametrize("encoding", DERIVED, ids=lambda e: e.name)
def test_a_gradient_that_was_not_finite_stays_so(encoding):
    how = ACTIVATIONS[encoding.settings[0]]
    for value in (math.nan, math.inf, -math.inf):
        x = normal((100,))
        x[70] = value
        got = encoding.decode(encoding.encode(x, seed()), x)
        if not how.derivative(x)[70].isfinite():
            assert not got[70].isfinite()


@each_dtype
@pytest.mark.parametrize("encoding", [e for e in LOSSY if e.unbiased], ids=lambda e: e.name)
def test_near_the_largest_number_is_right_or_nan(encoding, dtype):
    """Never silently wrong: a grid that passes what the type holds has no code."""
    largest = torch.finfo(dtype).max
    for share in (0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        x = (normal((256,), torch.float64, at=1).clamp(-2, 2) / 2 * share * largest).to(dtype)
        back = encoding.decode(encoding.encode(x, seed()), x).double()
        unit = 1.0 if dtype is torch.float16 else 2.0**-66  # float32 holds no square of these
        step = (6 * encoding.average(x * unit).double()).sqrt() / unit
        right = back.isfinite()
        allowed = 1.01 * step + 2 * torch.finfo(dtype).eps * largest
        assert ((back - x.double()).abs() <= allowed)[right].all()
        assert right.all() or share >= 0.5


@each_dtype
@each
def test_subnormal_numbers(encoding, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    x = (normal((512,), torch.float64) * tiny / 4).to(dtype)
    back = encoding.decode(encoding.encode(x, seed()), x)
    if encoding in LOSSY:
        assert float(back.double().abs().max()) <= max(8 * tiny, 2.0**-120)
    else:
        assert back.isfinite().all()


# -- Casts and block formats -------------------------------------------------------------------------


def test_casts_are_torchs_own():
    x = normal((4, 128))
    code = BY_NAME["bfloat16"].encode(x, seed())
    assert torch.equal(BY_NAME["bfloat16"].decode(code, x), x.bfloat16().float())
    scale = x.abs().amax(1, keepdim=True) / 448
    want = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(BY_NAME["e4m3 g128"].decode(BY_NAME["e4m3 g128"].encode(x, seed()), x), want)


def test_float16_holds_what_is_past_its_range():
    x = normal((1000,)) * 1e6
    back = BY_NAME["float16"].decode(BY_NAME["float16"].encode(x, seed()), x)
    assert float(((back - x) / x).abs().max()) < 1e-3
    small = normal((1000,))
    back = BY_NAME["float16"].decode(BY_NAME["float16"].encode(small, seed()), small)
    assert torch.equal(back, small.half().float())


def test_every_number_of_four_bits_comes_back():
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat([values, -values, values]).repeat(
        4
    )  # 96: in each block of 16 and 32 there is a 6
    for name in ("mxfp4", "nvfp4"):
        for scale in (1.0, 2.0**-20, 2.0**30):
            back = BY_NAME[name].decode(BY_NAME[name].encode(x * scale, seed()), x)
            assert torch.equal(back, x * scale)


def test_every_number_of_e4m3_comes_back():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = every[every.isfinite()].view(-1, 2)
    x = torch.cat([x, torch.full((len(x), 30), 448.0)], 1)
    back = BY_NAME["mxfp8"].decode(BY_NAME["mxfp8"].encode(x, seed()), x)
    assert torch.equal(back, x)


@pytest.mark.parametrize("name", sorted(narrow_floats.FORMATS))
def test_no_element_of_a_block_is_cut_off(name):
    how = narrow_floats.FORMATS[name]
    x = torch.exp(10 * normal((4096,))).view(-1, how.block)
    whole = narrow_floats._whole_scale(x, how)
    scale = narrow_floats._block_scale(x, whole, how, torch.float32) * whole
    assert (x <= scale * how.numbers.largest).all()
    kept = how.scale_of(how.scale_bytes(scale / whole)) * whole
    assert torch.equal(kept, scale)
    if not how.two_scales:
        assert (x.amax(1, keepdim=True) > scale / 2 * how.numbers.largest * (1 - 1e-6)).all()


# -- Derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_gradient_times_a_derivative(activation, channels_last):
    encoding = DERIVATIVES[activation][0]
    x = saved(encoding, normal((3, 4, 5, 6), channels_last=channels_last))
    order = by_stride(x.shape, x.stride())
    code = encoding.encode(x, seed())
    derivative = encoding.decode(code, x)
    whole = normal((6, 8, 10, 12), at=1)
    for grad in (
        whole[:3, :4, :5, :6].contiguous(),
        normal((3, 4, 5, 6), channels_last=True, at=1),
        whole[::2, ::2, ::2, ::2],
        torch.ones(()).expand(3, 4, 5, 6),
    ):
        got = derivatives.derivative_backward(grad, code, order, activation, 8)
        assert torch.equal(got, grad * derivative)
        want = ACTIVATIONS[activation].target(grad, x, **dict(ACTIVATIONS[activation].options))
        assert got.stride() == want.stride()
        over = grad.clone()
        given = (over, code, order, activation, 8)
        assert torch.equal(derivatives.derivative_backward_out(*given, grad_input=over), got)
        step = 1 / encoding_inside(encoding)
        assert float((got - want).abs().max()) <= step * float(grad.abs().max()) * 1.01


def encoding_inside(encoding):
    activation, bits = encoding.settings
    return derivatives.grid(ACTIVATIONS[activation], bits)[1]


@pytest.mark.parametrize("encoding", DERIVED, ids=lambda e: e.name)
def test_gradients_are_unbiased(encoding):
    activation, bits = encoding.settings
    x, grad = saved(encoding, normal((64, 256))), normal((64, 256), at=1)
    want = ACTIVATIONS[activation].derivative(x.double()) * grad
    total = 0.0
    for n in range(256):
        code = encoding.encode(x, seed(n))
        total = total + derivatives.derivative_backward(grad, code, [0, 1], activation, bits) - want
    expected = float((encoding.variance(x) * grad.square()).double().sum())
    assert float(total.square().sum()) / 256 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_derivatives_are_within_their_range(activation):
    how = ACTIVATIONS[activation]
    x = torch.linspace(-12, 12, 100001)
    if activation in ("tanh", "sigmoid"):
        x = getattr(torch, activation)(x)
    found = how.derivative(x)
    assert how.low <= float(found.min()) <= how.low + 0.002
    assert how.high - 0.002 <= float(found.max()) <= how.high
    for bits in (8, 4, 2):
        first, inside = derivatives.grid(how, bits)
        assert first / inside <= how.low
        assert (first + 2**bits - 1) / inside >= how.high - 1e-9


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation", ["gelu", "gelu tanh", "silu"])
def test_where_an_activation_is_flat_there_is_no_error(activation, bits):
    encoding = {e.settings[1]: e for e in DERIVATIVES[activation]}[bits]
    x = torch.tensor([-200.0, 200.0]).repeat_interleave(64)
    back = encoding.decode(encoding.encode(x, seed()), x)
    assert torch.equal(back, (x > 0).float())


def test_which_backward_has_a_derivative():
    graph = torch.fx.Graph()
    g, x = graph.placeholder("g"), graph.placeholder("x")
    calls = {
        "gelu": (aten.gelu_backward.default, {}),
        "gelu tanh": (aten.gelu_backward.default, {"approximate": "tanh"}),
        "silu": (aten.silu_backward.default, {}),
        "tanh": (aten.tanh_backward.default, {}),
        "sigmoid": (aten.sigmoid_backward.default, {}),
    }
    for name, (target, options) in calls.items():
        node = graph.call_function(target, (g, x), options)
        assert activation_of(node) == (g, x, name)
    plain = graph.call_function(aten.gelu_backward.default, (g, x), {"approximate": "none"})
    assert activation_of(plain) == (g, x, "gelu")
    other = graph.call_function(aten.threshold_backward.default, (g, x, 0))
    assert activation_of(other) is None


# -- Fake kernels ------------------------------------------------------------------------------------


@each
def test_operators_under_symbolic_sizes(encoding):
    x = saved(encoding, normal((3, 5, 8, 9), channels_last=True))
    code = encoding.encode(x, seed())
    torch.library.opcheck(encoding.encoder, encoding.to_encode(x, seed(), 2))
    given = encoding.to_decode(code, list(x.shape), list(x.stride()), x.dtype)
    torch.library.opcheck(encoding.decoder, given)
    if encoding not in LOSSY:
        given = (x, code, by_stride(x.shape, x.stride()), *encoding.settings)
        torch.library.opcheck(derivatives.derivative_backward, given)


@each
def test_bytes_of_a_symbolic_size(encoding):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC
    x = mode.from_tensor(
        normal((6, 50)),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[dynamic, dynamic]),
    )
    with mode:
        code = encoding.encode(x, mode.from_tensor(seed()))
        back = encoding.decode(code, x)
    n = x.shape[0].node.expr * x.shape[1].node.expr
    values = dict(zip((x.shape[0].node.expr, x.shape[1].node.expr), (7, 67), strict=True))
    got = code.untyped_storage().nbytes().node.expr.subs(values)
    assert got == encoding.nbytes.subs(fxmem.ELEMENTS, 7 * 67), n
    assert (back.shape, back.stride()) == (x.shape, x.stride())
    assert not mode.shape_env.guards


# -- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.complex64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64],
    ids=str,
)
@each
def test_other_types_are_refused(encoding, dtype):
    x = torch.zeros(64, dtype=dtype)
    with pytest.raises(EncodingError, match=f"{dtype} has no lossy code"):
        encoding.encode(x, seed())
    with pytest.raises(TypeError):
        encoding.variance(x)
    code = encoding.encode(torch.zeros(64), seed())
    with pytest.raises(EncodingError, match="no lossy code"):
        encoding.decode(code, x)


@each
def test_gaps_and_overlaps_are_refused(encoding):
    x = normal((16, 16))
    for odd in (x[:, ::2], x[:, :8], torch.ones(()).expand(16, 16), x.as_strided((4, 8), (4, 1))):
        with pytest.raises(EncodingError, match=r"encode x\.contiguous"):
            encoding.encode(odd, seed())
        encoding.encode(odd.contiguous(), seed())


@each
def test_codes_of_another_size_are_refused(encoding):
    x = saved(encoding, normal((16, 32)))
    code = encoding.encode(x, seed())
    for other in (x[:8], x.new_empty((2000,))):
        with pytest.raises(EncodingError, match="has a code of"):
            encoding.decode(code, other)
    with pytest.raises(EncodingError, match="has a code of"):
        encoding.decode(code.float(), x)


@pytest.mark.parametrize("encoding", UNBIASED, ids=lambda e: e.name)
def test_other_seeds_are_refused(encoding):
    x = normal((64,))
    for wrong in (torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, dtype=torch.int32)):
        with pytest.raises(EncodingError, match="a seed is one int64"):
            encoding.encode(x, wrong)


def test_arguments_that_make_no_code_are_refused():
    x = normal((64,))
    for bits, group in ((3, 64), (0, 64), (16, 64), (4, 0), (4, 8), (4, 63), (4, 1 << 17)):
        with pytest.raises(EncodingError, match=r"codes have|a group is"):
            quantizers.quantize_groups(x, bits, group, seed(), 0)
    with pytest.raises(EncodingError, match="a cast is to one of"):
        narrow_floats.cast_blocks(x, torch.int8, None)
    with pytest.raises(EncodingError, match="a block is a power of two"):
        narrow_floats.cast_blocks(x, torch.float8_e4m3fn, 100)
    with pytest.raises(EncodingError, match="a block format is one of mxfp8"):
        narrow_floats.quantize_blocks(x, "mxfp6", seed(), 0)
    with pytest.raises(EncodingError, match="an activation is one of gelu"):
        derivatives.encode_derivative(x, "relu", 4, seed(), 0)
    with pytest.raises(EncodingError, match="codes have 2, 4 or 8 bits"):
        derivatives.encode_derivative(x, "gelu", 3, seed(), 0)


# -- Encodings of users ------------------------------------------------------------------------------


def scaled(encoding, factor):
    return dataclasses.replace(encoding, variance=lambda x: encoding.variance(x) * factor)


INT4 = BY_NAME["int4 g64"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"nbytes": INT4.nbytes + 1}, "has 0 bytes, not 1"),
        ({"nbytes": fxmem.ELEMENTS / 2}, "has 36 bytes, not 0"),
        ({"encoder": lambda x, *_: x}, "make an operator of it"),
        ({"decoder": quantizers.dequantize_groups._overloadpacket}, "make an operator of it"),
        ({"settings": (4, 100)}, "a group is a power of two"),
        ({"settings": (4,)}, "fails on a small tensor"),
        ({"variance": lambda x: INT4.variance(x) / 2}, "squared error is"),
        ({"variance": lambda x: INT4.variance(x).mean()}, "one figure for each element"),
        ({"dtypes": ()}, "of no type of tensor"),
        ({"dtypes": (torch.int64,)}, "no lossy code"),
        ({"seeded": False}, "no seed to take a mean over"),
        ({"variance": lambda x: {}["no such key"]}, "fails on a small tensor: KeyError"),
    ],
    ids=lambda given: given if isinstance(given, str) else next(iter(given)),
)
def test_an_encoding_that_is_not_what_it_says_is_refused(wrong, why):
    with pytest.raises(EncodingError, match=why):
        fxmem.register_encoding(dataclasses.replace(INT4, name="mine", **wrong))
    assert lossy.encodings() == LOSSY


def test_a_biased_encoding_is_not_unbiased():
    @torch.library.custom_op("fxmem_tests::half_up", mutates_args=())
    def half_up(x: torch.Tensor, seed: torch.Tensor, stream: int) -> torch.Tensor:
        noise = torch.randn(
            x.shape, generator=torch.Generator().manual_seed(int(seed) + 99 * stream)
        )
        return (x + 0.1 + 0.1 * noise).flatten().half()

    @half_up.register_fake
    def _(x, seed, stream):
        return x.new_empty((x.numel(),), dtype=torch.float16)

    @torch.library.custom_op("fxmem_tests::back", mutates_args=())
    def back(
        code: torch.Tensor, size: list[int], stride: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        found = code.new_empty_strided(size, stride, dtype=dtype)
        return found.copy_(code.view(size))

    @back.register_fake
    def _(code, size, stride, dtype):
        return code.new_empty_strided(size, stride, dtype=dtype)

    mine = lossy.LossyEncoding(
        "shifted",
        2 * fxmem.ELEMENTS,
        torch.ops.fxmem_tests.half_up.default,
        torch.ops.fxmem_tests.back.default,
        variance=lambda x: torch.full_like(x, 0.02),
        average=lambda x: torch.full_like(x, 0.02),
        dtypes=(torch.float32,),
    )
    with pytest.raises(EncodingError, match=r"mean of 64 draws is off by 0\.1"):
        fxmem.register_encoding(mine)
    honest = dataclasses.replace(mine, unbiased=False)
    try:
        assert fxmem.register_encoding(honest) is honest
        assert lossy.encodings() == (*LOSSY, honest)
        with pytest.raises(EncodingError, match="'shifted' already"):
            fxmem.register_encoding(honest)
    finally:
        lossy._REGISTERED.clear()


def test_errors_of_elements_must_be_independent():
    """All rounded by one draw: right for each element, but the errors of a sum do not average out."""

    @torch.library.custom_op("fxmem_tests::dither", mutates_args=())
    def dither(x: torch.Tensor, seed: torch.Tensor, stream: int) -> torch.Tensor:
        draw = torch.rand((), generator=torch.Generator().manual_seed(int(seed) + 99 * stream))
        return (x * 2 + draw).floor().flatten().to(torch.int8)

    @dither.register_fake
    def _(x, seed, stream):
        return x.new_empty((x.numel(),), dtype=torch.int8)

    @torch.library.custom_op("fxmem_tests::halves", mutates_args=())
    def halves(
        code: torch.Tensor, size: list[int], stride: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        found = code.new_empty_strided(size, stride, dtype=dtype)
        return found.copy_(torch.as_strided(code.to(dtype) / 2, size, stride))

    @halves.register_fake
    def _(code, size, stride, dtype):
        return code.new_empty_strided(size, stride, dtype=dtype)

    def variance(x):
        share = (x * 2).frac().abs()
        return share * (1 - share) / 4

    mine = lossy.LossyEncoding(
        "dither",
        fxmem.ELEMENTS,
        torch.ops.fxmem_tests.dither.default,
        torch.ops.fxmem_tests.halves.default,
        variance=variance,
        average=lambda x: torch.full_like(x, 1 / 24),
        dtypes=(torch.float32,),
    )
    with pytest.raises(EncodingError, match="sums over all elements"):
        fxmem.register_encoding(mine)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(EncodingError, match="'int4 g64' already"):
        fxmem.register_encoding(INT4)


@pytest.mark.parametrize("encoding", LOSSY, ids=lambda e: e.name)
def test_ours_pass_the_trials(encoding):
    check_encoding(encoding)


def test_kernels_that_do_not_agree_are_not_used():
    def fails(device):
        raise RuntimeError("no such driver")

    here = torch.device("cpu")
    assert is_proven(lambda device: True, here)
    with pytest.warns(UserWarning, match="give other bits than torch on cpu"):
        assert not is_proven(lambda device: False, here)
    with pytest.warns(UserWarning, match="fail with RuntimeError: no such driver on cpu"):
        assert not is_proven(fails, here)
