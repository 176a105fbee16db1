"""Models from transformers are captured as eager runs them: no mask where eager makes none."""

import pytest
import torch
from quick import but_slow

import fxmem
from fxmem.graphs.capture import StepCall, capture

transformers = pytest.importorskip("transformers")


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # without a mask, attention repeats them itself
        max_position_embeddings=32,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def tokens():
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def gradients(module, model, *args, **kwargs):
    model.zero_grad(set_to_none=True)
    module(*args, **kwargs).loss.backward()
    return [p.grad for p in model.parameters()]


def assert_eager(model, optimized, *args, **kwargs):
    eager = gradients(model, model, *args, **kwargs)
    mine = gradients(optimized, model, *args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(eager, mine, strict=True))


def operators_of(model, kwargs):
    with capture(StepCall(model, (tokens(),), kwargs)) as captured:
        nodes = captured.graph.nodes
        return [str(n.target) for n in nodes if n.op == "call_function"]


def test_attention_gets_no_mask_where_eager_makes_none():
    model, kwargs = llama(), {"labels": tokens()}
    names = operators_of(model, kwargs)
    assert not {"aten.where.self", "aten.le.Tensor", "aten.cumsum.default"}.intersection(names)
    optimized = fxmem.optimize(model, "0.9x", (tokens(),), example_kwargs=kwargs)
    assert_eager(model, optimized, tokens(), **kwargs)
    assert len(optimized._session.programs) == 1


def assert_close(model, optimized, kwargs):
    """Eager takes no mask where it sees that it needs none, and then rounds otherwise."""
    eager = gradients(model, model, tokens(), **kwargs)
    mine = gradients(optimized, model, tokens(), **kwargs)
    torch.testing.assert_close(eager, mine)


@pytest.mark.parametrize("lengths", but_slow([(16,), (10, 6), (4, 4, 8)], [(10, 6)]))
def test_packed_rows_stay_packed(lengths):
    """Positions that come from outside are never taken for what they are in the example."""
    model = llama()
    positions = [
        torch.cat([torch.arange(n) for n in one]).expand(2, -1) for one in ((16,), lengths)
    ]
    kwargs = [{"labels": tokens(), "position_ids": p} for p in positions]
    optimized = fxmem.optimize(model, "0.9x", (tokens(),), example_kwargs=kwargs[0])
    for one in kwargs:
        assert_close(model, optimized, one)


def test_padded_rows_stay_padded():
    model = llama()
    mask = torch.ones(2, 16, dtype=torch.long)
    padded = mask.clone()
    padded[0, 12:] = 0
    kwargs = [{"labels": tokens(), "attention_mask": one} for one in (mask, padded)]
    optimized = fxmem.optimize(model, "0.9x", (tokens(),), example_kwargs=kwargs[0])
    for one in kwargs:
        assert_close(model, optimized, one)
