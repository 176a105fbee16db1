"""The packages stand on floors: each imports only from lower ones, and nothing goes in circles."""

import ast
import graphlib
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The one table, the lowest first.  What is on one line stands on one floor and imports from lower floors
# alone; the modules of a package may import each other, but not in a circle.  Imports inside functions
# count, those for type checkers alone do not.  A new package, or file beside them, gets its line here.
FLOORS = (
    ("fxmem._torch",),
    ("fxmem.basics",),
    ("fxmem.graphs",),
    ("fxmem.codes",),
    ("fxmem.analysis",),
    ("fxmem.passes",),
    ("fxmem.planning",),
    ("fxmem.reports",),
    ("fxmem.steps",),
    ("fxmem.api",),
    ("fxmem.looking", "fxmem.sizing", "fxmem.backend", "fxmem.doctor"),
    ("fxmem.trainers",),
    ("fxmem",),
    # programs that use the library as everybody does
    ("fxmem.demo_models",),
    ("fxmem.demo",),
    ("fxmem.cli",),
    ("fxmem.__main__",),
)


def sources():
    """Our modules by their dotted names; a package's name is that of its ``__init__``."""
    found = {}
    for folder, prefix in (("fxmem", "fxmem"), ("passes", "fxmem.passes")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if prefix == "fxmem" and parts[0] == "passes":
                continue  # reached through the link
            own = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *own))] = path.read_text()
    return found


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


def module_of(name, modules):
    """The module that a name stands in: ``fxmem.basics.units.shown`` is in ``fxmem.basics.units``."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def place_of(module):
    """The entry of the table that a module belongs to, and its floor."""
    package = ".".join(module.split(".")[:2])
    floors = {entry: floor for floor, entries in enumerate(FLOORS) for entry in entries}
    return package, floors.get(package)


def too_high(module, source, modules):
    """The imports of a module that do not lead down."""
    place, floor = place_of(module)
    if floor is None:
        return [f"{module} has no floor: give it one in the table"]
    wrong = []
    for name in imports(source):
        other = module_of(name, modules)
        its_place, its_floor = place_of(other)
        if its_place != place and (its_floor is None or its_floor >= floor):
            wrong.append(f"{module} (floor {floor}) imports {name} (floor {its_floor})")
    return wrong


def circle(modules):
    """Modules that import each other in a circle, or None."""
    graph = defaultdict(set)
    for module, source in modules.items():
        graph[module] = {module_of(name, modules) for name in imports(source)} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize("module", sources())
def test_imports_lead_down(module):
    modules = sources()
    assert not too_high(module, modules[module], modules)


def test_nothing_goes_in_circles():
    assert circle(sources()) is None


def test_the_table_lists_what_is_there():
    listed = {entry for entries in FLOORS for entry in entries}
    assert listed == {place_of(module)[0] for module in sources()}


def test_readme_draws_the_floors():
    """Each package is on a line of its own there, the highest first."""
    text = (ROOT / "README.md").read_text()
    drawn = [text.index(f"\n{entry.removeprefix('fxmem.')}/ ") for (entry, *_) in FLOORS[:9]]
    assert drawn == sorted(drawn, reverse=True)


def test_an_import_upwards_is_found():
    modules = sources()
    planted = (
        "from fxmem.basics.errors import FxmemError\n\n"
        "def f():\n    from fxmem.steps.pipeline import decide\n"
    )
    assert too_high("fxmem.basics.units", planted, modules) == [
        "fxmem.basics.units (floor 1) imports fxmem.steps.pipeline.decide (floor 8)"
    ]
    assert too_high("fxmem.basics.units", "import fxmem", modules)
    assert too_high("fxmem.graphs.graph", "from fxmem.passes import base", modules)
    assert not too_high("fxmem.passes.recompute", "from fxmem.graphs import graph", modules)
    assert too_high("fxmem.new", "", modules)


def test_a_circle_is_found():
    planted = {
        "fxmem.basics.a": "from fxmem.basics import b",
        "fxmem.basics.b": "def f():\n    import fxmem.basics.a",
    }
    assert sorted(set(circle(planted | {"fxmem.basics": "", "fxmem": ""}))) == sorted(planted)


def test_imports_for_type_checkers_do_not_count():
    planted = (
        "if TYPE_CHECKING:\n    from fxmem.steps.pipeline import Options\nelse:\n    import torch\n"
    )
    assert not too_high("fxmem.basics.units", planted, sources())
    with pytest.raises(AssertionError, match="absolute"):
        imports("from .pipeline import Options")


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_no_script_hides_a_module_of_pythons_own(folder):
    """torch starts Pythons with the scripts' folder on their path; ours was taken for ``encodings`` once.

    That Python then does not start, and Inductor writes code without vectors.
    """
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
