"""Every hazard gives, bit for bit, what eager gives, or the clear refusal it is allowed."""

import threading

import pytest
import torch
from hazards import HAZARDS, Case, Seen, differences, fresh, gradients, snapshot, total
from quick import but_slow

import fxmem
from fxmem.basics.errors import FxmemError


def planned(case: Case, budget) -> fxmem.OptimizedModule:
    return fxmem.optimize(
        case.model,
        budget,
        case.inputs,
        example_kwargs=case.kwargs,
        dynamic_shapes=case.dynamic_shapes,
        on_infeasible="best",
    )


# How a case's model becomes the step that is run: name -> apply(case).  Eager against itself shows
# that the programs are deterministic.
APPLY = {
    "eager": lambda case: case.model,
    "unbounded": lambda case: planned(case, "1TiB"),
    "0.5x": lambda case: planned(case, "0.5x"),
    "min": lambda case: planned(case, "min"),
}

REFUSALS = (RuntimeError, NotImplementedError, FxmemError)

pytestmark = pytest.mark.filterwarnings("ignore:fxmem. no plan fits")


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def observe(case: Case, apply) -> Seen:
    with case.context():
        step = apply(case)
    return case.run(step)


@pytest.mark.parametrize("how", but_slow(APPLY, APPLY.keys() - {"unbounded", "0.5x"}))
@pytest.mark.parametrize("name", HAZARDS)
def test_hazard(name, how):
    hazard = HAZARDS[name]
    want = observe(hazard.make(), APPLY["eager"])
    case = hazard.make()
    try:
        got = observe(case, APPLY[how])
    except REFUSALS:
        if hazard.refusal_ok and how != "eager":
            return
        raise
    wrong = differences(want, got)
    if wrong and case.right is not None:
        case = hazard.make()
        wrong = differences(case.right(case.model), got)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("how", APPLY)
def test_two_models_made_and_run_in_two_threads(how):
    names = ("inplace-chain", "saved-is-output")
    cases = {name: HAZARDS[name].make() for name in names}  # here: threads share one generator
    got: dict[str, Seen] = {}

    def work(name):
        case = cases[name]
        inputs = fresh(case.inputs)
        step = APPLY[how](case)
        outputs = step(*inputs)
        total(outputs).backward()
        got[name] = {"outputs": snapshot(outputs), "step": gradients(step)}

    workers = [threading.Thread(target=work, args=(name,)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in names:
        case = HAZARDS[name].make()
        want = case.run(case.model)["step 0"]
        assert not differences(want["outputs"], got[name]["outputs"])
        assert not differences(want, {**want, **got[name]["step"]})


def test_differences_are_found():
    a = torch.tensor([0.0, float("nan")])
    assert not differences({"a": [a]}, {"a": [a.clone()]})
    assert differences(a, -a)
    assert differences(torch.zeros(2, 3), torch.zeros(3, 2).t())
    assert differences({"a": None}, {"a": torch.zeros(1)})
    assert differences({"a": 1}, {"b": 1})
