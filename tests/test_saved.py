"""What is saved for the backward: the right storages, their bytes, and whose they are."""

import gc
import json
import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from quick import but_slow
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxmem
from tests.families import FAMILIES


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)

    def forward(self, x):
        h = F.relu(self.up(x))
        return self.norm(h).sigmoid().sum()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 2)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def without_lines(text):
    return re.sub(r"\.py:\d+", ".py:N", text)


def operators(found):
    return [(row.operator, *row.also) for row in found.rows]


def test_one_line_a_storage():
    # relu's result is saved by relu and read by the norm: it exists once.
    assert_expected_inline(
        without_lines(str(fxmem.saved(Block(), torch.randn(4, 8)))),
        """\
Block saves 544 B for its backward
type       bytes  saved by                 module  source
---------  -----  -----------------------  ------  ----------------
f32[4,16]    256  relu, native_layer_norm          test_saved.py:N
f32[4,1]      16  native_layer_norm        norm    test_saved.py:N
f32[4,1]      16  native_layer_norm        norm    test_saved.py:N
f32[4,16]    256  sigmoid                          test_saved.py:N
TOTAL        544
The backward also reads 256 B of parameters, buffers and inputs, which are there anyway.""",
    )


def test_a_loss_outside_the_model():
    model, x, target = nn.Linear(8, 4), torch.randn(3, 8), torch.tensor([0, 1, 2])
    inside = fxmem.saved(model, x)
    assert inside.total == 0
    assert "saves 0 B" in str(inside)
    outside = fxmem.saved(model, x, loss_fn=F.cross_entropy, loss_inputs=(target,))
    assert operators(outside) == [("log_softmax", "nll_loss"), ("nll_loss",)]
    assert outside.total == 3 * 4 * 4 + 4


def test_keyword_arguments_reach_the_model():
    found = fxmem.saved(Of(lambda x: x), torch.randn(2))
    assert not found.rows

    class Scaled(nn.Module):
        def forward(self, x, *, scale):
            return (x.exp() * scale).sum()

    x = torch.randn(3, requires_grad=True)
    assert fxmem.saved(Scaled(), x, scale=2.0).total == 12


def test_a_meta_model_saves_what_a_real_one_does():
    x = torch.randn(4, 8)
    with torch.device("meta"):
        meta = Block()
    assert fxmem.saved(meta, x.to("meta")) == fxmem.saved(Block(), x)


def test_a_function_of_the_users_own_has_its_name():
    x = torch.randn(5, requires_grad=True)
    assert operators(fxmem.saved(Of(Doubled.apply), x)) == [("Doubled",)]


def test_a_checkpointed_region_saves_its_inputs_alone():
    def region(h):
        return h.sin().exp().cos()

    def step(x):
        return checkpoint(region, x * 2, use_reentrant=False).sum()

    x = torch.randn(7, requires_grad=True)
    assert operators(fxmem.saved(Of(step), x)) == [("checkpoint",)]
    assert len(fxmem.saved(Of(lambda x: region(x * 2).sum()), x).rows) == 2


def test_what_no_output_depends_on_is_not_saved():
    def step(x):
        x.exp().sin().sum()  # its graph dies with it
        return x.tanh()

    x = torch.randn(3, requires_grad=True)
    assert operators(fxmem.saved(Of(step), x)) == [("tanh",)]


def test_a_small_view_holds_its_whole_storage():
    x = torch.randn(64, requires_grad=True)
    (row,) = fxmem.saved(Of(lambda x: (x * 1.0)[:2].sin()), x).rows
    assert row.type == "f32[2]"
    assert row.nbytes == 256


def test_parameters_are_there_anyway():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    found = fxmem.saved(model, torch.randn(1, 8))
    assert found.total == 32
    assert found.resident == 4 * (8 + 16)  # the input, and the second weight; the first is not read


QUICK = "llama", "gpt2", "resnet"
ALL = *QUICK, "vit", "convnext", "unet", "encdec"


@pytest.mark.parametrize("name", but_slow(ALL, QUICK))
def test_the_total_is_what_the_allocator_holds_after_a_forward(name):
    model, args, kwargs = FAMILIES[name].build("tiny")
    model(*args, **kwargs)  # whatever a first call sets up for good
    gc.collect()
    measured = fxmem.measure(lambda: model(*args, **kwargs))
    outputs = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in torch.utils._pytree.tree_leaves(measured.result)
        if isinstance(t, torch.Tensor)
    }
    found = fxmem.saved(model, *args, **kwargs)
    held = measured.at_end - measured.at_start
    assert found.total > 0
    # An output may be saved, too; nothing else lives on.
    assert found.total <= held <= found.total + sum(outputs.values())


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fxmem.saved(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_text_is_at_most_100_columns_and_the_same_each_time():
    model, args, kwargs = FAMILIES["gpt2"].build("tiny")
    text = str(fxmem.saved(model, *args, **kwargs))
    assert text == str(fxmem.saved(model, *args, **kwargs))
    assert max(map(len, text.splitlines())) <= 100


def test_equal_blocks_fold_to_one_line():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
    found = fxmem.saved(model, torch.randn(4, 8))
    assert_expected_inline(
        found.text(fold=True),
        """\
Sequential saves 640 B for its backward
type      n  bytes  saved by  module  source
--------  -  -----  --------  ------  ------
f32[4,8]  3    384  gelu      *.1
f32[4,8]  2    256  addmm     *.0
TOTAL     5    640
The backward also reads 640 B of parameters, buffers and inputs, which are there anyway.""",
    )
    assert len(str(found).splitlines()) == len(found.rows) + 5


def test_to_dict_is_json():
    data = json.loads(json.dumps(fxmem.saved(Block(), torch.randn(4, 8)).to_dict()))
    assert data["total"] == sum(row["nbytes"] for row in data["rows"])


def test_refusals():
    with pytest.raises(
        fxmem.FxmemError, match=r"takes a torch.nn.Module and its inputs, not Tensor"
    ):
        fxmem.saved(torch.randn(2), 3)
    with pytest.raises(fxmem.CaptureError, match="does not run on fake tensors"):
        fxmem.saved(nn.Linear(3, 3), torch.randn(2, 5))
