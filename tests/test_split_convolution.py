"""Splitting a convolution's backward: what is split, what stays, no bit changes, and fewer bytes."""

# ruff: noqa: E501 (a node is one line of text, however long)

import itertools
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hazards import differences, snapshot
from quick import but_slow
from test_engine import capture_once
from test_passes import assert_same_outputs, captured, changed, tensor
from torch import nn

import fxmem
from fxmem.analysis.cost import flops
from fxmem.graphs.convolution import convolution_input_backward, reads_shape_alone
from fxmem.graphs.measure import cpu_allocations
from fxmem.graphs.workspace import LAYOUT, Call, measure_call
from fxmem.passes.in_place import InPlacePass
from fxmem.passes.split_convolution import SplitConvolutionPass

aten = torch.ops.aten


def two_convolutions(act=F.gelu):
    def body(m, x):
        return F.conv2d(act(F.conv2d(x, m.a, padding=1)), m.b, m.c, padding=1).sum()

    return captured(
        body, tensor(2, 3, 6, 6), a=tensor(4, 3, 3, 3), b=tensor(5, 4, 3, 3), c=tensor(5)
    )


def split_in(graph):
    """The split calls after the pass, which changes no result."""
    after = SplitConvolutionPass().apply(graph)
    assert_same_outputs(graph, after)
    return [n for n in after.nodes if n.target is convolution_input_backward]


# -- The graph -------------------------------------------------------------------------------------------


def test_the_weight_comes_first_and_the_input_is_not_read_again():
    graph = two_convolutions()
    after, text = changed(graph, SplitConvolutionPass())
    assert_expected_inline(
        text,
        """\
- convolution_backward: (f32[2, 4, 6, 6], f32[5, 4, 3, 3], f32[5]) = convolution_backward(expand, gelu, primals_3, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
+ convolution_backward: (NoneType, f32[5, 4, 3, 3], f32[5]) = convolution_backward(expand, gelu, primals_3, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True])
- getitem: f32[2, 4, 6, 6] = getitem(convolution_backward, 0)
+ convolution_backward_input: f32[2, 4, 6, 6] = convolution_input_backward(expand, primals_3, [2, 4, 6, 6], [144, 36, 6, 1], [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
- gelu_backward: f32[2, 4, 6, 6] = gelu_backward(getitem, convolution)
+ gelu_backward: f32[2, 4, 6, 6] = gelu_backward(convolution_backward_input, convolution)""",
    )
    assert_same_outputs(graph, after)
    assert changed(after, SplitConvolutionPass())[1] == ""


def test_two_calls_count_as_many_operations_as_one():
    def body(m, x):
        return F.conv2d(F.gelu(F.conv2d(x, m.a)), m.b, stride=2).sum()

    tensors = {"a": tensor(4, 3, 3, 3), "b": tensor(5, 4, 3, 3)}
    graph = captured(body, tensor(2, 3, 9, 9), **tensors)
    after = SplitConvolutionPass().apply(graph)
    one = flops(graph.node("convolution_backward"))
    both = [after.node("convolution_backward"), after.node("convolution_backward_input")]
    assert sum(map(flops, both)) == one
    assert 0 < flops(both[0]) < one


def test_the_gradient_may_be_written_over():
    after = InPlacePass().apply(SplitConvolutionPass().apply(two_convolutions()))
    written = after.node("gelu_backward").kwargs["grad_input"]
    assert written.target is convolution_input_backward


# -- What stays one call ---------------------------------------------------------------------------------


def test_an_input_that_is_read_later_stays():
    assert split_in(two_convolutions())
    assert not split_in(two_convolutions(F.relu))  # its own backward reads what it returned


def test_an_input_that_is_returned_stays():
    def body(m, x):
        h = F.gelu(F.conv2d(x, m.a, padding=1))
        return F.conv2d(h, m.b, padding=1).sum(), h

    tensors = {"a": tensor(4, 3, 3, 3), "b": tensor(5, 4, 3, 3)}
    assert not split_in(captured(body, tensor(2, 3, 6, 6), **tensors))


def test_the_users_own_input_stays():
    x = tensor(2, 3, 6, 6).requires_grad_()
    graph = captured(lambda m, x: F.conv2d(x, m.a).sum(), x, a=tensor(4, 3, 3, 3))
    assert graph.node("convolution_backward").args[-1] == [True, True, False]
    assert not split_in(graph)


def test_one_gradient_alone_stays():
    def frozen(m, x):
        return F.conv2d(F.gelu(F.conv2d(x, m.a, padding=1)), m.b_weight, padding=1).sum()

    weights = {"a": tensor(4, 3, 3, 3), "b_weight": tensor(5, 4, 3, 3)}
    graph = captured(frozen, tensor(2, 3, 6, 6), **weights)
    masks = [n.args[-1] for n in graph.nodes if n.target is aten.convolution_backward.default]
    assert masks == [[True, False, False], [False, True, False]]
    assert not split_in(graph)


def test_a_weight_that_is_larger_than_its_input_stays():
    def body(m, x):
        return F.conv2d(F.gelu(F.conv2d(x, m.a, padding=1)), m.b, padding=1).sum()

    tensors = {"a": tensor(4, 3, 3, 3), "b": tensor(64, 4, 3, 3)}
    assert not split_in(captured(body, tensor(2, 3, 6, 6), **tensors))
    assert split_in(captured(body, tensor(2, 3, 36, 36), **tensors))


def test_a_kernel_that_reads_its_input_stays():
    def body(m, x):
        return F.conv2d(F.gelu(F.conv2d(x, m.a, padding=1)), m.b, padding=1).sum()

    tensors = {"a": tensor(4, 3, 3, 3).double(), "b": tensor(5, 4, 3, 3).double()}
    assert not split_in(captured(body, tensor(2, 3, 6, 6).double(), **tensors))


def test_an_input_with_other_strides_than_traced_stays():
    graph = two_convolutions()
    graph.node("gelu").meta[LAYOUT] = ((144, 1, 24, 4),)
    assert not split_in(graph)


# -- The bits --------------------------------------------------------------------------------------------

FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
GROUPS = (1, 2, 8)  # of 8 channels, so the last is depthwise


def calls(dims, dtype):
    """(gradient, input, weight, the other arguments) over what a convolution may be told."""
    switches = itertools.product(
        GROUPS,
        (False, True),  # transposed
        (1, 3, 4),  # kernel
        (1, 2),  # stride
        (0, 1),  # padding
        (1, 2),  # dilation
        (False, True),  # the input is channels_last
        (False, True),  # the weight is
    )
    for groups, transposed, kernel, stride, padding, dilation, x_last, w_last in switches:
        if dims != 2 and (padding == 0 or stride == dilation == 2):
            continue
        shape = (8, 16 // groups) if transposed else (16, 8 // groups)
        x = tensor(2, 8, *(9, 7, 8)[:dims]).to(dtype)
        w = tensor(*shape, *dims * [kernel], seed=1).to(dtype)
        x = x.contiguous(memory_format=FORMATS[dims] if x_last else torch.contiguous_format)
        w = w.contiguous(memory_format=FORMATS[dims] if w_last else torch.contiguous_format)
        output_padding = dims * [stride - 1 if transposed else 0]
        how = (dims * [stride], dims * [padding], dims * [dilation], transposed)
        how = (*how, output_padding, groups)
        y = torch.convolution(x, w, None, *how)
        yield torch.randn_like(y), x, w, how


def has_onednn_kernels(dtype):
    """Are convolutions oneDNN's here? In bfloat16 only where the processor has AVX-512."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dims", but_slow([1, 2, 3], [1, 2]))
def test_two_calls_give_the_bits_of_one(dims, dtype):
    without_bytes = 0
    for g, x, w, how in calls(dims, dtype):
        bias_sizes = [how[-1] and w.shape[1] * how[-1] if how[3] else w.shape[0]]
        want = aten.convolution_backward(g, x, w, bias_sizes, *how, [True, True, True])
        others = aten.convolution_backward(g, x, w, bias_sizes, *how, [False, True, True])
        alone = convolution_input_backward(g, w, x.shape, x.stride(), bias_sizes, *how)
        wrong = differences(snapshot(want), snapshot((alone, *others[1:])))
        assert not wrong, f"{how} {x.stride()} {w.stride()}\n" + "\n".join(wrong)
        without_bytes += reads_shape_alone(x, w, bias_sizes, how)
    assert (without_bytes > 0) == has_onednn_kernels(dtype)


@pytest.mark.parametrize(("dtype", "missing"), [(torch.float32, 0), (torch.float64, 1)])
def test_the_input_takes_no_bytes_where_no_element_is_read(dtype, missing):
    x, w = tensor(4, 8, 32, 32).to(dtype), tensor(4, 8, 3, 3).to(dtype)
    g = F.conv2d(x, w, padding=1)
    how = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    alone = (g, w, list(x.shape), list(x.stride()), *how)
    whole = (g, x, w, *how, [True, False, False])
    here = torch.device("cpu")
    one = measure_call(Call.of(aten.convolution_backward.default, whole, {}), here)
    entry = measure_call(Call.of(convolution_input_backward, alone, {}), here)
    assert entry.storages == (x.nbytes,)
    assert entry.nbytes == one.nbytes + missing * x.nbytes


# -- The step --------------------------------------------------------------------------------------------


def stack():
    """Convolutions whose inputs die in their backward, and a batch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU()]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 24 * 24, 1)), tensor(4, 3, 24, 24)


class Loss(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).square().mean()


def splits(planned):
    nodes = planned.split.backward.graph.nodes
    return sum(n.target is convolution_input_backward for n in nodes)


def test_a_step_is_split_where_that_pays():
    body, x = stack()
    with capture_once(Loss(body), (x,)) as found:
        whole, split = found.analysis.planner, found.analysis.split.planner
        unchanged, smallest = whole.keep_all().outcome.peak, whole.smallest().outcome.peak
        for budget, expected in ((unchanged, 0), (smallest - 1, 3), ("min", 3)):
            planned = found.decide(budget)
            assert splits(planned) == expected
            assert planned.plan.keep_all_peak == unchanged
        assert split.keep_all().outcome.peak < unchanged
        assert split.smallest().outcome.peak < 0.9 * smallest


def test_the_faster_form_is_taken():
    body, x = stack()
    with capture_once(Loss(body), (x,)) as found:
        whole, split = found.analysis, found.analysis.split
        high, low = whole.planner.keep_all().outcome.peak, whole.planner.smallest().outcome.peak
        forms = set()
        for n in range(1, 9):
            budget = low + (high - low) * n // 9
            planned = found.decide(budget)
            seconds = [whole.flow.seconds + whole.planner.fit(budget).outcome.seconds]
            if (fitting := split.planner.fit(budget)) is not None:
                seconds.append(split.flow.seconds + fitting.outcome.seconds)
            assert planned.plan.seconds + planned.plan.added_seconds == pytest.approx(min(seconds))
            forms.add(splits(planned))
        assert forms == {0, 3}


def test_a_step_without_convolutions_is_analyzed_once():
    with capture_once(Loss(nn.Linear(4, 4)), (tensor(2, 4),)) as found:
        assert found.analysis.split is found.analysis


def test_the_predicted_bytes_are_those_that_it_takes():
    body, x = stack()
    model = Loss(body)

    def seen(step):
        def run():
            loss = step(x)
            loss.backward()
            return loss

        for _ in range(2):  # the first call compiles
            model.zero_grad(set_to_none=True)
            sizes, loss = cpu_allocations(run)
        return snapshot([loss, [p.grad for p in model.parameters()]]), max(accumulate(sizes))

    want, _ = seen(model)
    step = fxmem.optimize(model, "0.7x", (x,))
    got, peak = seen(step)
    assert not differences(want, got)
    assert abs(peak + step.plan.resident - step.plan.predicted_peak) <= 64


@pytest.mark.parametrize("budget", ["1TiB", "0.9x"])
def test_a_saved_plan_is_of_the_form_that_it_was_made_for(budget, tmp_path):
    body, x = stack()
    model = Loss(body)
    fxmem.plan(model, budget, (x,)).save(tmp_path / "plan.json")
    saved = fxmem.Plan.load(tmp_path / "plan.json")
    step = fxmem.optimize(model, budget, (x,), plan=saved)
    assert step.plan.predicted_peak == saved.predicted_peak
    assert step.plan.fingerprint == saved.fingerprint == fxmem.plan(model, budget, (x,)).fingerprint


# -- Plans of both forms -----------------------------------------------------------------------------


def plans_of_both_forms():
    body, x = stack()
    model = Loss(body)
    return model, x, fxmem.plan(model, "1TiB", (x,)), fxmem.plan(model, "min", (x,))


def test_plans_of_both_forms_can_be_compared():
    _, _, whole, split = plans_of_both_forms()
    assert whole.fingerprint != split.fingerprint
    assert "recompute" in whole.diff(split)


def test_a_given_plan_that_does_not_fit_is_not_called_the_smallest():
    model, x, whole, split = plans_of_both_forms()
    with pytest.raises(fxmem.BudgetInfeasibleError, match="the plan that was given peaks") as error:
        fxmem.optimize(model, split.predicted_peak, (x,), plan=whole)
    assert error.value.smallest_peak == whole.predicted_peak


def test_a_gradient_that_a_kernel_makes_though_nobody_asked_counts_as_its_workspace():
    """The weight's, of a convolution whose bias alone trains."""

    class FrozenWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 16, 3, padding=1)
            self.second = nn.Conv2d(16, 16, 3, padding=1)
            self.second.weight.requires_grad_(False)

        def forward(self, x):
            return self.second(torch.sin(self.first(x))).sum()

    fxmem.optimize(FrozenWeight(), "min", (tensor(2, 4, 30, 30),), verify=True)
