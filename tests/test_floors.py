"""The modules stand on floors: each imports only from lower ones, so nothing goes in circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The one table.  A file stands strictly above everything that it imports when it is imported;
# imports for type checkers alone do not count.  A new file gets its line here.
FLOORS = {
    # words, numbers, torch's private side
    "fxmem/errors.py": 0,
    "fxmem/gpus.py": 0,
    "fxmem/_torch.py": 0,
    "fxmem/_transformers.py": 0,
    "fxmem/_torch_profiler.py": 0,
    "fxmem/_torch_distributed.py": 0,
    "fxmem/triton_kernels.py": 0,
    "fxmem/seeds.py": 0,
    "fxmem/untouched.py": 0,
    # one tensor, one device, one number
    "fxmem/_torch_eager.py": 1,
    "fxmem/_torch_inductor.py": 1,
    "fxmem/batch_norm.py": 1,
    "fxmem/convolution.py": 1,
    "fxmem/noise.py": 1,
    "fxmem/sizes.py": 1,
    "fxmem/units.py": 1,
    "fxmem/schema.py": 1,
    "fxmem/emit.py": 1,
    "fxmem/device.py": 1,
    "fxmem/tables.py": 1,
    "fxmem/boundary.py": 1,
    # the graph, and measuring for real
    "fxmem/graph.py": 2,
    "fxmem/polynomials.py": 2,
    "fxmem/packing.py": 2,
    "fxmem/encodings.py": 3,
    "fxmem/derivatives.py": 3,
    "fxmem/narrow_floats.py": 3,
    "fxmem/quantizers.py": 3,
    "fxmem/fits.py": 2,
    "fxmem/lifetimes.py": 2,
    "fxmem/fakes.py": 2,
    "fxmem/measure.py": 2,
    "fxmem/budget.py": 2,
    # questions about the graph
    "fxmem/operators.py": 3,
    "fxmem/forms.py": 3,
    "fxmem/cost.py": 3,
    "fxmem/workspace.py": 3,
    "fxmem/capture.py": 3,
    "fxmem/consumers.py": 3,
    "fxmem/charts.py": 3,
    "fxmem/plots.py": 3,
    "fxmem/partition.py": 3,
    "fxmem/plan.py": 3,
    "fxmem/readable.py": 3,
    "passes/__init__.py": 3,
    "fxmem/ranks.py": 4,
    "passes/base.py": 4,
    # numbers for a whole step
    "fxmem/liveness.py": 4,
    "fxmem/overwriting.py": 4,
    "fxmem/standins.py": 4,
    "fxmem/timings.py": 4,
    "fxmem/page.py": 4,
    "fxmem/dynamic.py": 4,
    "fxmem/scaling.py": 4,
    "fxmem/shards.py": 4,
    "fxmem/dataflow.py": 5,
    "fxmem/ledger.py": 5,
    "fxmem/categories.py": 5,
    "fxmem/inventory.py": 5,
    "fxmem/words.py": 6,
    "fxmem/step_report.py": 6,
    # rewriting and choosing
    "fxmem/baseline.py": 5,
    "fxmem/saved.py": 5,
    "fxmem/report.py": 5,
    "fxmem/oom.py": 6,
    "fxmem/verify.py": 5,
    "passes/cleanup.py": 5,
    "passes/deduplicate.py": 5,
    "passes/gradient_layouts.py": 5,
    "passes/identities.py": 5,
    "passes/in_place.py": 5,
    "passes/order.py": 5,
    "passes/recompute.py": 5,
    "passes/cudnn_batch_norm.py": 5,
    "passes/rectify.py": 5,
    "passes/split_convolution.py": 5,
    "passes/unread.py": 5,
    "passes/strides.py": 5,
    "fxmem/lossless.py": 4,
    "fxmem/encoding_trials.py": 5,
    "fxmem/lossy.py": 6,
    "passes/encode.py": 6,
    "fxmem/gradient_noise.py": 7,
    "fxmem/travelling.py": 8,
    "fxmem/allotment.py": 8,
    "passes/quantize.py": 7,
    "passes/tangents.py": 6,
    "passes/uncode.py": 7,
    "fxmem/rebatch.py": 6,
    "fxmem/simulate.py": 6,
    "fxmem/tags.py": 6,
    "fxmem/certificates.py": 7,
    "fxmem/schedule.py": 7,
    "fxmem/relaxation.py": 7,
    "fxmem/search.py": 8,
    "fxmem/symbolic.py": 8,
    "fxmem/solver.py": 9,
    "fxmem/descent.py": 10,
    "fxmem/planner.py": 11,
    "fxmem/decisions.py": 12,
    # one step from end to end
    "fxmem/pipeline.py": 13,
    "fxmem/tracing.py": 14,
    "fxmem/validity.py": 14,
    "fxmem/backward.py": 14,
    "fxmem/inductor.py": 15,
    "fxmem/code.py": 16,
    "fxmem/runtime.py": 17,
    "fxmem/footprint.py": 15,
    "fxmem/api.py": 18,
    "fxmem/looking.py": 19,
    "fxmem/sizing.py": 19,
    "fxmem/doctor.py": 19,
    "fxmem/backend_session.py": 16,
    "fxmem/backend_graph.py": 17,
    "fxmem/backend.py": 19,
    "fxmem/trainers.py": 20,
    "fxmem/__init__.py": 21,
    # programs that use the library as everybody does
    "fxmem/demo_models.py": 22,
    "fxmem/demo.py": 23,
    "fxmem/cli.py": 24,
    "fxmem/__main__.py": 25,
}


def sources():
    """Our files as the table names them."""
    return {
        f"{folder}/{path.name}": path.read_text()
        for folder in ("fxmem", "passes")
        for path in sorted((ROOT / folder).glob("*.py"))
    }


def imports(source):
    """What a module imports of ours, as dotted names, outside ``if TYPE_CHECKING``."""
    found = []
    stack = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: imports are absolute here")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        stack += ast.iter_child_nodes(node)
    return sorted({name for name in found if name.split(".")[0] == "fxmem"})


def file_of(name, files):
    """The file that a dotted name stands in: ``fxmem.units.shown`` is in ``fxmem/units.py``."""
    parts = name.split(".")[1:]
    folder = "fxmem"
    if parts[:1] == ["passes"]:
        folder, parts = "passes", parts[1:]
    if parts and f"{folder}/{parts[0]}.py" in files:
        return f"{folder}/{parts[0]}.py"
    return f"{folder}/__init__.py"


def too_high(file, source, floors=FLOORS):
    """The imports of a file that do not lead down."""
    floor = floors.get(file)
    if floor is None:
        return [f"{file} has no floor: give it one in the table"]
    wrong = []
    for name in imports(source):
        target = file_of(name, floors)
        if target not in floors or floors[target] >= floor:
            wrong.append(f"{file} (floor {floor}) imports {name} (floor {floors.get(target)})")
    return wrong


@pytest.mark.parametrize("file", sources())
def test_imports_lead_down(file):
    assert not too_high(file, sources()[file])


def test_the_table_lists_the_files_that_are_there():
    assert sorted(FLOORS) == sorted(sources())


def test_an_import_upwards_is_found():
    planted = (
        "from fxmem.errors import FxmemError\n\ndef f():\n    from fxmem.pipeline import decide\n"
    )
    assert too_high("fxmem/units.py", planted) == [
        "fxmem/units.py (floor 1) imports fxmem.pipeline.decide (floor 13)"
    ]
    assert too_high("fxmem/units.py", "import fxmem")
    assert too_high("fxmem/units.py", "from fxmem.passes import base")
    assert too_high("passes/recompute.py", "from fxmem.passes.cleanup import CleanupPass")
    assert not too_high("passes/recompute.py", "from fxmem.passes.base import insert_like")
    assert too_high("fxmem/new.py", "")


def test_imports_for_type_checkers_do_not_count():
    planted = "if TYPE_CHECKING:\n    from fxmem.pipeline import Options\nelse:\n    import torch\n"
    assert not too_high("fxmem/units.py", planted)
    with pytest.raises(AssertionError, match="absolute"):
        imports("from .pipeline import Options")
