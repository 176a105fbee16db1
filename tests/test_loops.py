"""Training loops that people have, with a budget and without: the same parameters, bit for bit."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from torch import nn

import fxmem
from fxmem import backend
from fxmem.trainers import lightning_callback, transformers_callback


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data|accelerate")
        yield


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'fxmem[test]'")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = sequential()

    def forward(self, x):
        return self.layers(x)


def net():
    torch.manual_seed(0)
    return Net()


def sequential():
    wide = (nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3))
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.1), *wide, nn.Linear(64, 4))


def data(count=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 128, 8, generator=generator)
    return [(one, one.sum(-1).abs().long() % 4) for one in x]


def compiled(model, budget="0.8x", **options):
    model.compile(backend=backend.fxmem, options={"budget": budget, **options})
    return model


def optimized(model, budget="0.8x"):
    return fxmem.optimize(model, budget, (data()[0][0],))


def assert_same(want, got):
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def states(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# -- Loops of one's own ----------------------------------------------------------------------------


def plain(step, model, optimizer):
    for x, y in data(4):
        optimizer.zero_grad()
        F.cross_entropy(step(x), y).backward()
        optimizer.step()


def with_autocast_and_scaler(step, model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in data(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(step(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


def with_accumulation_and_an_average(step, model, optimizer):
    average = torch.optim.swa_utils.AveragedModel(model)  # a deep copy
    for i, (x, y) in enumerate(data(6)):
        (F.cross_entropy(step(x), y) / 3).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
    with torch.no_grad():  # the average answers by itself
        average.eval()
        model.register_buffer("answer", average(data(1)[0][0]))
        average.train()


def stopped_and_resumed(step, model, optimizer):
    plain(step, model, optimizer)
    kept = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    plain(step, model, optimizer)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    plain(step, model, optimizer)


@pytest.mark.parametrize(
    ("loop", "how", "planned"),
    [
        (with_autocast_and_scaler, {"fused": True}, compiled),
        (with_autocast_and_scaler, {"fused": True}, optimized),
        (with_accumulation_and_an_average, {"foreach": True}, compiled),
        (with_accumulation_and_an_average, {"foreach": True}, optimized),
        (stopped_and_resumed, {}, compiled),
        (stopped_and_resumed, {}, optimized),
    ],
)
def test_a_loop(loop, how, planned):
    found = []
    for apply in (lambda model: model, planned):
        torch._dynamo.reset()
        model = net()
        step = apply(model)
        torch.manual_seed(7)
        loop(step, model, torch.optim.AdamW(model.parameters(), 1e-2, **how))
        found.append(states(model))
    assert_same(*found)
    plans = [step.plan] if planned is optimized else fxmem.plans(model)
    assert any(d.action != "keep" for plan in plans for d in plan.decisions)


# -- accelerate ----------------------------------------------------------------------------


def test_accelerate():
    accelerate = package("accelerate")
    found = []
    for apply in (lambda model: model, compiled):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = apply(net())
        keys = list(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model, optimizer, batches = accelerator.prepare(model, optimizer, data(4))
        torch.manual_seed(7)
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        assert list(accelerator.get_state_dict(model)) == keys
        found.append(states(accelerator.unwrap_model(model)))
    assert_same(*found)
    assert fxmem.plans(model)


# -- transformers ----------------------------------------------------------------------------


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
        attn_implementation="eager",  # the others take no mask in eager, and one where they are traced
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def texts():
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(transformers, model, folder, callbacks=(), **how):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=4, use_cpu=True, report_to=[],
        save_steps=2, disable_tqdm=True, seed=3, logging_steps=4, **how,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=list(callbacks))


def test_transformers_trainer(tmp_path):
    transformers = package("transformers")
    package("accelerate")
    accumulating = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    plain, budgeted = llama(transformers), llama(transformers)
    trainer(transformers, plain, tmp_path / "plain", **accumulating).train()
    callback = transformers_callback("16MiB")
    trainer(transformers, budgeted, tmp_path / "mine", [callback], **accumulating).train()
    (plan,) = fxmem.plans(budgeted)
    assert_same(states(plain), states(budgeted))
    # AdamW has two moments and a counter for each parameter; gradients are there while they accumulate.
    nbytes = sum(p.nbytes for p in budgeted.parameters())
    assert plan.reserve >= 3 * nbytes
    assert plan.predicted_peak + plan.reserve <= 16 * 2**20
    assert budgeted._compiled_call_impl is None
    # A checkpoint of the run with a budget is resumed by one without, and the other way round.
    resumed = llama(transformers)
    trainer(transformers, resumed, tmp_path / "resumed", **accumulating).train(
        resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-2")
    )
    assert_same(states(plain), states(resumed))


@pytest.mark.parametrize("how", ["argument", "model", "compile"])
def test_transformers_trainer_refuses_what_decides_the_same(how, tmp_path):
    transformers = package("transformers")
    package("accelerate")
    model, arguments = llama(transformers), {}
    if how == "model":
        model.gradient_checkpointing_enable()
    elif how == "argument":
        known = transformers.TrainingArguments.__dataclass_fields__
        names = ("activation_checkpointing", "gradient_checkpointing")
        arguments[next(name for name in names if name in known)] = True
    else:
        arguments["torch_compile"] = True
    run = trainer(transformers, model, tmp_path, [transformers_callback("16MiB")], **arguments)
    expected = "torch_compile=True" if how == "compile" else "activation checkpointing is on"
    with pytest.raises(fxmem.FxmemError, match=expected):
        run.train()


# -- Lightning ----------------------------------------------------------------------------


def lightning_module(lightning):
    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = sequential()  # of which module.compile() of torch compiles nothing

        def training_step(self, batch, index):
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    return Lit()


def fitted(lightning, folder, callbacks=(), **how):
    module = lightning_module(lightning)
    torch.manual_seed(7)
    run = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=list(callbacks), gradient_clip_val=0.1, **how,
    )  # fmt: skip
    run.fit(module, torch.utils.data.DataLoader(data(6), batch_size=None))
    run.save_checkpoint(folder / "last.ckpt", weights_only=True)
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(tmp_path, precision):
    lightning = package("lightning.pytorch")
    how = {"precision": precision, "accumulate_grad_batches": 2}
    want = fitted(lightning, tmp_path, **how)
    callback = lightning_callback("1MiB", module="model")
    got = fitted(lightning, tmp_path, [callback], **how)
    assert_same(states(want), states(got))
    (plan,) = fxmem.plans(got.model)
    assert plan.reserve >= 3 * sum(p.nbytes for p in got.parameters())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(want.state_dict())


def test_lightning_is_told_of_a_module_that_nobody_calls(tmp_path):
    lightning = package("lightning.pytorch")
    with pytest.raises(fxmem.FxmemError, match=r"no step of self\(\.\.\.\) was planned"):
        fitted(lightning, tmp_path, [lightning_callback("1MiB")])


def test_a_wrong_option_is_told_of_before_the_first_batch(tmp_path):
    lightning = package("lightning.pytorch")
    with pytest.raises(fxmem.FxmemError, match="did you mean 'on_infeasible'"):
        fitted(lightning, tmp_path, [lightning_callback("1MiB", on_infeasable="best")])
