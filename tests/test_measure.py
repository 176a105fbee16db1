"""Measured bytes against bytes known in advance."""

import threading

import pytest
import torch

from fxmem._torch.profiler import mark, record
from fxmem.basics.errors import FxmemError
from fxmem.graphs.measure import Measurement, cpu_allocations, cpu_phases, measure

# Large enough that a stray small tensor cannot hide a miscount, small enough to be quick.
N = 1 << 16
BLOCK = 4 * N


def block():
    return torch.empty(N)


def above_start(measured):
    return measured.peak - measured.at_start, measured.at_end - measured.at_start


def test_a_transient_is_in_the_peak_and_not_in_the_end():
    def step():
        block()

    measured = measure(step)
    assert above_start(measured) == (BLOCK, 0)
    assert measured.result is None
    assert measured.device == "cpu"


def test_what_the_step_returns_is_still_held():
    measured = measure(lambda: block().neg())
    assert above_start(measured) == (2 * BLOCK, BLOCK)
    assert measured.result.shape == (N,)


def test_two_phases_and_what_lives_between_them():
    held = []
    first, second = cpu_phases(lambda: held.append(block()), lambda: block().add(held.pop()))
    assert first == [BLOCK]
    assert second == [BLOCK, BLOCK, -BLOCK, -BLOCK, -BLOCK]


def test_the_start_counts_live_storages_once():
    before = measure(lambda: None).at_start
    tensor = block()
    views = [tensor[:5], tensor.view(2, -1), torch.nn.Parameter(tensor)]
    after = measure(lambda: None)
    assert after.at_start - before == BLOCK
    assert above_start(after) == (0, 0)
    del views


def test_the_start_counts_gradients_that_python_has_not_seen():
    layer = torch.nn.Linear(N, 1, bias=False)
    x = torch.ones(1, N)
    before = measure(lambda: None).at_start
    layer(x).sum().backward()
    assert measure(lambda: None).at_start - before == BLOCK
    assert layer.weight.grad is not None


def test_fake_and_meta_tensors_hold_nothing():
    from torch._subclasses import FakeTensorMode

    before = measure(lambda: None).at_start
    with FakeTensorMode():
        held = [block(), torch.empty(N, device="meta")]
    held.append(torch.empty(N, device="meta"))
    assert measure(lambda: None).at_start == before


def test_memory_from_before_that_dies_in_the_step_makes_room():
    held = [block()]

    def step():
        held.clear()
        held.append(block())

    assert above_start(measure(step)) == (0, 0)


def test_memory_from_before_that_dies_lowers_the_end():
    held = [block(), block()]

    def step():
        block()
        held.pop()

    assert above_start(measure(step)) == (BLOCK, -BLOCK)


def test_memory_of_an_earlier_measurement_is_freed_once():
    held = [measure(block).result, block()]

    def step():
        held.clear()
        held.append(block())

    assert above_start(measure(step)) == (0, -BLOCK)


def test_a_block_that_is_resized_away_does_not_confuse_its_successor():
    old = torch.empty(N)
    kept = []

    def step():
        old.untyped_storage().resize_(0)
        kept.extend(block() for _ in range(3))

    measured = measure(step)
    # Resizing tells no one, so the old block may be counted to the end, unless its place is taken.
    assert 2 * BLOCK <= measured.peak - measured.at_start <= 3 * BLOCK


def test_a_training_step_peaks_where_arithmetic_says():
    w = torch.nn.Parameter(torch.ones(N))
    x = torch.ones(N)

    def step():
        (w * x).sum().backward()

    # Held at once: the product, then its gradient's only buffer (expanded), then w's gradient.
    first = measure(step)
    assert first.at_end - first.at_start == BLOCK
    assert BLOCK <= first.peak - first.at_start < 2 * BLOCK + 1024
    second = measure(step)
    assert second.at_start == first.at_end == second.at_end


def test_the_end_is_the_next_start():
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(32, 64)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        measured = measure(step)
        assert measured.at_end == measure(lambda: None).at_start


def test_garbage_of_before_is_collected_first():
    def garbage():
        cycle = [block()]
        cycle.append(cycle)

    before = measure(lambda: None).at_start
    garbage()
    assert measure(lambda: None).at_start == before


def test_the_step_may_use_profiler_scopes_of_its_own():
    def step():
        with torch.profiler.record_function("outer"):
            kept = block()
            with torch.profiler.record_function("inner"):
                block()
        return kept

    assert above_start(measure(step)) == (2 * BLOCK, BLOCK)


def test_an_exception_passes_and_leaves_no_profiler_running():
    def step():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure(step)
    with pytest.raises(KeyError, match="mine"):
        cpu_allocations(step)
    assert above_start(measure(block)) == (BLOCK, BLOCK)


def test_measurements_do_not_nest():
    with pytest.raises(FxmemError, match=r"already running.*do not nest"):
        measure(lambda: measure(block))
    with pytest.raises(FxmemError, match="profiler is already running"):
        measure(lambda: cpu_allocations(block))
    assert above_start(measure(block)) == (BLOCK, BLOCK)


def test_another_thread_cannot_measure_meanwhile():
    refused = []

    def other():
        try:
            measure(block)
        except FxmemError as error:
            refused.append(error)

    def step():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    measure(step)
    assert len(refused) == 1


def test_a_running_profiler_is_named():
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(FxmemError, match=r"outside the torch\.profiler block"),
    ):
        measure(block)
    assert above_start(measure(block)) == (BLOCK, BLOCK)


@pytest.mark.parametrize("step", [None, 3, torch.ones(1)])
def test_a_step_that_cannot_be_called_is_refused(step):
    with pytest.raises(FxmemError, match=r"needs a callable without arguments, not .*\n.*lambda"):
        measure(step)


def test_a_measurement_prints_as_one_line():
    measured = Measurement(3 << 20, 1 << 20, 2 << 20, "cpu", result=block())
    assert str(measured) == "peak 3.0 MiB on cpu (start 1.0 MiB, end 2.0 MiB)"
    assert "result" not in repr(measured)
    assert measured == Measurement(3 << 20, 1 << 20, 2 << 20, "cpu", result=None)


def test_allocations_are_signed_and_in_order():
    def work():
        a = torch.empty(N)
        b = torch.empty(2 * N)
        del a
        return b

    sizes, result = cpu_allocations(work)
    assert sizes == [BLOCK, 2 * BLOCK, -BLOCK]
    assert result.numel() == 2 * N


def test_allocations_leave_out_frees_of_memory_from_before():
    _, mine = cpu_allocations(block)
    held = [mine, block()]
    del mine
    assert cpu_allocations(held.clear)[0] == []


def test_threads_take_turns():
    # Without that, torch's profiler crashes the process.
    x = torch.randn(64, 64)
    found = []

    def work():
        found.extend(cpu_allocations(lambda: x.sin())[0][0] for _ in range(200))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [64 * 64 * 4] * 600


def test_scopes_of_others_are_not_recorded():
    # A collective of gloo's is one, and ends on a thread of gloo's: at times after the session, when its
    # memory is another's.
    def work():
        with torch.profiler.record_function("somebody's"):
            mark("ours")
            return torch.empty(N)

    events, _ = record(work)
    assert [(event.nbytes, event.mark) for event in events] == [(0, "ours"), (BLOCK, "")]


def test_marks_are_where_they_were_left():
    def work():
        for name in ("first", "second", "third"):
            mark(name)
            torch.empty(1, dtype=torch.uint8)  # of a mark's size
        with torch._subclasses.FakeTensorMode():
            mark("fake")

    mark("before")
    events, _ = record(work)
    mark("after")
    one = [(1, ""), (-1, "")]
    want = [(0, "first"), *one, (0, "second"), *one, (0, "third"), *one, (0, "fake")]
    assert [(event.nbytes, event.mark) for event in events] == want
    assert record(block)[0][0].mark == ""


def test_an_operators_workspace_is_seen():
    x = torch.ones(1, 8, 32, 32)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    sizes, result = cpu_allocations(lambda: conv(x))
    assert sum(sizes) == result.nbytes
    assert max(sizes) >= result.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_what_its_allocator_holds():
    def step():
        kept = torch.empty(N, device="cuda")
        torch.empty(N, device="cuda")
        return kept

    # The first time nothing is on the device before the step, the second time something is.
    for _ in range(2):
        measured = measure(step)
        assert measured.device == "cuda:0"
        assert above_start(measured) == (2 * BLOCK, BLOCK)
        kept = measured.result
    assert kept.is_cuda
