"""The command line: one function a command.

Exit status: 0 fits, 2 no plan fits the budget, 1 any other error.  With ``--json`` standard output
is one JSON object and nothing else; messages go to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

import fxmem
from fxmem.basics.errors import BudgetInfeasibleError, FxmemError
from fxmem.basics.tables import clean
from fxmem.basics.units import format_bytes, shown
from fxmem.doctor import examine
from fxmem.graphs.capture import StepCall
from fxmem.graphs.workspace import Entry, cache_path, device_at_hand
from fxmem.planning.plan import Plan
from fxmem.reports.fits import gpu_lines, gpu_rows
from fxmem.reports.report import Report
from fxmem.steps.analyze import calibrate

FITS, ERROR, INFEASIBLE = 0, 1, 2

MODEL_HELP = (
    "package.module:callable or file.py:callable; called without arguments, it returns "
    "(model, example_inputs) or (model, example_args, example_kwargs). "
    "This imports and runs that code."
)
BUDGET_HELP = (
    'bytes the whole step may hold at its peak: "20GiB", "512MB", "80%%" of the device, '
    '"0.5x" of the unchanged step, "auto" or "min"'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.  Usage errors and ``--help`` raise ``SystemExit``."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BudgetInfeasibleError as error:
        if options.json:
            known = error.best_plan.to_dict()["certificate"]
            smallest = {"smallest_peak": error.smallest_peak, "certificate": known}
            _print_json({"error": str(error), **smallest})
        return _complain(error, INFEASIBLE)
    except FxmemError as error:
        if options.json:
            _print_json({"error": str(error)})
        return _complain(error, ERROR)
    except KeyboardInterrupt:
        return _complain("interrupted", ERROR)


def _complain(error: object, status: int) -> int:
    for line in f"fxmem: {error}".splitlines():
        print(clean(line), file=sys.stderr)
    return status


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=1))


# -- The parser ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse exits with 2, which means infeasible here."""
        self.print_usage(sys.stderr)
        self.exit(ERROR, f"{self.prog}: {message}\n")


@dataclass(frozen=True)
class _Command:
    """One subcommand: what its help says, how it is used, what it accepts, what it does."""

    name: str
    help: str
    examples: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxmem",
        description="Make a PyTorch training step fit a number of bytes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=_examples(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.declare(one)
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.set_defaults(run=command.run)
    return parser


_EPILOG = """\
exit status: 0 fits, 2 no plan fits the budget, 1 any other error

examples:
  fxmem demo
  fxmem report models.py:build --budget 0.5x
  fxmem COMMAND --help
"""


def _examples(command: _Command) -> str:
    lines = [f"  fxmem {command.name} {line}".rstrip() for line in command.examples.splitlines()]
    return "\n".join(["examples:", *lines])


def _declare_planning(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--budget", required=required, help=BUDGET_HELP)
    _declare_allowed(parser)


def _declare_allowed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow", metavar="ACTIONS", help='comma-separated, such as "recompute,lossless"'
    )
    parser.add_argument("--reserve", help='bytes outside the step, such as "2GiB"')


def _declare_plan(parser: argparse.ArgumentParser) -> None:
    _declare_planning(parser)
    parser.add_argument("--out", metavar="FILE", help="save the plan as JSON")


def _declare_report(parser: argparse.ArgumentParser) -> None:
    _declare_planning(parser, required=False)
    parser.add_argument("--gpus", action="store_true", help="also say on which GPUs it fits")
    parser.add_argument("--html", metavar="FILE", help="write the page, one file without network")
    parser.add_argument("--png", metavar="FILE", help="write the chart (pip install fxmem[plot])")
    parser.add_argument("--svg", metavar="FILE", help="the same as lines instead of pixels")


def _declare_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def _declare_saved(parser: argparse.ArgumentParser) -> None:
    _declare_model(parser)
    parser.add_argument("--fold", action="store_true", help="equal blocks on one line")


def _declare_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="say where it fits; " + MODEL_HELP
    )
    _declare_allowed(parser)


def _declare_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN.json", help="a saved plan")


def _declare_liveness(parser: argparse.ArgumentParser) -> None:
    _declare_model(parser)
    parser.add_argument("--sort", default="born", help='such as "bytes", "born" or "life"')
    parser.add_argument("--top", type=_positive, help="only so many rows")
    parser.add_argument("--fold", action="store_true", help="equal blocks as one row")
    parser.add_argument("--format", help='of tabulate, such as "github", "html" or "plain"')
    parser.add_argument(
        "--at", type=_sizes, metavar="B=8,S=2048", help="the peak at other sizes, too"
    )


def _declare_max_batch(parser: argparse.ArgumentParser) -> None:
    _declare_planning(parser)
    parser.add_argument("--symbol", default="B", help="the size to enlarge: B (default) or S")
    parser.add_argument("--at", type=_sizes, default={}, metavar="S=2048", help="the other sizes")


def _sizes(text: str) -> dict[str, int]:
    """``B=8,S=2048``"""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not name.isidentifier() or not size.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} should be sizes, such as B=8,S=2048")
        found[name] = int(size)
    return found


def _declare_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A.json", help="a saved plan")
    parser.add_argument("after", metavar="B.json", help="a saved plan of the same step")


def _declare_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("gpt", "resnet"), default="gpt")
    parser.add_argument("--budget", default="0.4x", help=BUDGET_HELP)
    parser.add_argument("--steps", type=_positive, default=20, help="training steps, each way")


def _declare_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="whose operators to measure, by default those of the demo's models; " + MODEL_HELP,
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )


def _declare_nothing(parser: argparse.ArgumentParser) -> None:
    return


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


# -- The commands ----------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    plan = _planned(options)
    if options.out:
        plan.save(options.out)
    if options.json:
        _print_json(plan.to_dict())
        return FITS
    print(plan)
    if options.out:
        print(f"written to {clean(options.out)}")
    return FITS


def _report(options: argparse.Namespace) -> int:
    if options.budget is None:
        return _step_report(options)
    model, args, kwargs = load_model(options.model)
    report = fxmem.report(
        model, args, options.budget, example_kwargs=kwargs, gpus=options.gpus, **_allowed(options)
    )
    assert isinstance(report, Report)  # there is a budget
    written = {"html": options.html, "png": options.png, "svg": options.svg}
    for form, path in written.items():
        if path:
            getattr(report, form)(path)
    if options.json:
        _print_json(report.to_dict())
    else:
        print(report)
        for path in filter(None, written.values()):
            print(f"written to {clean(path)}")
    return FITS if report.fits else INFEASIBLE


def _saved(options: argparse.Namespace) -> int:
    model, args, kwargs = load_model(options.model)
    found = fxmem.saved(model, *args, **kwargs)
    if options.json:
        _print_json(found.to_dict())
    else:
        print(found.text(fold=options.fold))
    return FITS


def _gpus(options: argparse.Namespace) -> int:
    if options.model is None:
        if options.json:
            _print_json({"gpus": gpu_rows()})
        else:
            print("\n".join(gpu_lines()))
        return FITS
    model, args, kwargs = load_model(options.model)
    found = fxmem.fits(model, args, example_kwargs=kwargs, **_allowed(options))
    if options.json:
        _print_json(found.to_dict())
    else:
        print(found)
    return FITS if found.anywhere else INFEASIBLE


def _validate(options: argparse.Namespace) -> int:
    problems = Plan.validate(options.plan)
    if options.json:
        _print_json({"valid": not problems, "problems": problems})
    elif problems:
        print("\n".join(clean(problem) for problem in problems))
    else:
        print(f"{clean(options.plan)} is a plan of this version")
    return ERROR if problems else FITS


def _step_report(options: argparse.Namespace) -> int:
    for name in ("allow", "gpus", "html", "png", "svg"):
        if getattr(options, name) not in (None, False):
            raise FxmemError(f"--{name} is about plans, and a plan needs a --budget")
    model, args, kwargs = load_model(options.model)
    reserve = _reserve(options.reserve) if options.reserve is not None else 0
    report = fxmem.report(model, args, example_kwargs=kwargs, reserve=reserve)
    if options.json:
        _print_json(report.to_dict())
    else:
        print(report)
    return FITS


def _liveness(options: argparse.Namespace) -> int:
    model, args, kwargs = load_model(options.model)
    found = fxmem.liveness(model, args, example_kwargs=kwargs)
    at = found.peak_at(**options.at) if options.at else None
    if options.json:
        _print_json(
            {**found.to_dict(), **({} if at is None else {"at": options.at, "peak_at": at})}
        )
        return FITS
    how = {"sort": options.sort, "top": options.top, "fold": options.fold}
    print("\n".join(found.head()))
    if at is not None:
        sizes = ", ".join(f"{name}={size}" for name, size in options.at.items())
        print(f"peak at {sizes}: {format_bytes(at)} ({at} bytes)")
    print()
    print(found.table(options.format, **how) if options.format else found.narrow(**how))
    return FITS


def _max_batch(options: argparse.Namespace) -> int:
    model, args, kwargs = load_model(options.model)
    size = fxmem.max_batch(
        model,
        options.budget,
        args,
        example_kwargs=kwargs,
        symbol=options.symbol,
        sizes=options.at,
        **_allowed(options),
    )
    if options.json:
        _print_json({"symbol": options.symbol, "largest": size, "at": options.at})
    else:
        print(f"{options.symbol} = {size} is the largest that fits {options.budget}")
    return FITS


def _diff(options: argparse.Namespace) -> int:
    before, after = Plan.load(options.before), Plan.load(options.after)
    lines = [clean(line) for line in before.diff(after).splitlines()]
    if not options.json:
        print("\n".join(lines))
        return FITS
    _print_json(
        {
            "predicted_peak": [before.predicted_peak, after.predicted_peak],
            "predicted_overhead": [before.predicted_overhead, after.predicted_overhead],
            "changes": [line.strip() for line in lines[1:]],
        }
    )
    return FITS


def _doctor(options: argparse.Namespace) -> int:
    found = examine()
    if options.json:
        _print_json(found.to_dict())
    else:
        print(found)
    return FITS if found.healthy else ERROR


def _calibrate(options: argparse.Namespace) -> int:
    from fxmem.demo_models import samples

    device = torch.device(options.device) if options.device else device_at_hand()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FxmemError("torch sees no CUDA device here\n  try: --device cpu")
    steps = [load_model(options.model)] if options.model else [(*s, {}) for s in samples()]
    table: dict[str, Entry] = {}
    for model, args, kwargs in steps:
        table |= calibrate(StepCall(model, args, kwargs), device).table
    by_size = sorted(table.items(), key=lambda item: item[1].nbytes, reverse=True)
    largest = {signature: entry.nbytes for signature, entry in by_size[:10] if entry.nbytes}
    file = str(cache_path(device))
    if options.json:
        _print_json({"measured": len(table), "largest": largest, "file": file})
        return FITS
    for signature, nbytes in largest.items():
        print(f"{format_bytes(nbytes):>12}  {clean(signature)[:84]}")
    print(f"{len(table)} operators measured on {device}, written to {clean(file)}")
    return FITS


def _demo(options: argparse.Namespace) -> int:
    from fxmem.demo import run  # models and data are of no use to the other commands

    result = run(options.model, options.budget, options.steps)
    if options.json:
        _print_json(result.to_dict())
    else:
        print(result)
    return FITS if result.identical and result.report.fits else ERROR


_COMMANDS = (
    _Command(
        "demo",
        "train a small model twice: as it is, and in a budget",
        "\n--model resnet --budget 0.6x",
        _declare_demo,
        _demo,
    ),
    _Command(
        "plan",
        "plan a training step for a budget",
        "models.py:build --budget 8GiB --out plan.json\nmypackage.models:build --budget 0.5x --json",
        _declare_plan,
        _plan,
    ),
    _Command(
        "report",
        "the full report: of a plan, or of the step as it is",
        "models.py:build\nmodels.py:build --budget 0.5x\n"
        "models.py:build --budget 8GiB --html step.html --gpus",
        _declare_report,
        _report,
    ),
    _Command(
        "liveness",
        "every storage of a step, and its peak for any size",
        "models.py:build --sort bytes --top 20 --fold\nmodels.py:build --at B=8,S=2048",
        _declare_liveness,
        _liveness,
    ),
    _Command(
        "max-batch",
        "the largest batch that fits a budget, as the model is or with --allow under a plan",
        "models.py:build --budget 8GiB\nmodels.py:build --budget 8GiB --allow recompute,lossless",
        _declare_max_batch,
        _max_batch,
    ),
    _Command(
        "saved",
        "list what the step saves for its backward, as it is",
        "models.py:build\nmodels.py:build --fold",
        _declare_saved,
        _saved,
    ),
    _Command(
        "diff",
        "what changes from one saved plan to another",
        "loose.json tight.json",
        _declare_diff,
        _diff,
    ),
    _Command(
        "validate",
        "check the form of a saved plan",
        "plan.json",
        _declare_validate,
        _validate,
    ),
    _Command(
        "gpus",
        "list common GPUs, or say on which a step fits",
        "\nmodels.py:build --reserve 2GiB",
        _declare_gpus,
        _gpus,
    ),
    _Command(
        "calibrate",
        "measure what operators hold while they run, on the device at hand",
        "\nmodels.py:build --device cuda",
        _declare_calibrate,
        _calibrate,
    ),
    _Command(
        "doctor",
        "examine this machine: versions, devices, files, and whether fxmem works here",
        "\n--json",
        _declare_nothing,
        _doctor,
    ),
)


def _planned(options: argparse.Namespace) -> Plan:
    model, args, kwargs = load_model(options.model)
    return fxmem.plan(model, options.budget, args, example_kwargs=kwargs, **_allowed(options))


def _allowed(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords that say what a plan may do."""
    more: dict[str, Any] = {}
    if options.allow is not None:
        more["allow"] = tuple(p.strip() for p in options.allow.split(",") if p.strip())
    if options.reserve is not None:
        more["reserve"] = _reserve(options.reserve)
    return more


def _reserve(text: str) -> int | str:
    return 0 if text.strip() == "0" else text


# -- MODEL -----------------------------------------------------------------------------------------

Loaded = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


def load_model(spec: str) -> Loaded:
    """Import and call what ``spec`` names; see ``MODEL_HELP``.

    Raises ``FxmemError`` when it cannot be found, when it raises, or when it returns another thing.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise FxmemError(
            f"cannot read {shown(spec)} as MODEL: it should be package.module:callable or "
            "file.py:callable\n  try: models.py:build"
        )
    module = _imported(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise FxmemError(
            f"{place} has no callable {shown(name)}\n"
            f"  found: {', '.join(_functions(module)) or 'none'}"
        )
    return _checked(spec, _user_code(spec, function))


def _imported(place: str) -> Any:
    if place.endswith(".py"):
        return _from_file(place)
    # The script `fxmem`, unlike `python -m fxmem`, does not start with the current folder.
    if "" not in sys.path:
        sys.path.insert(0, "")
    return _user_code(place, lambda: importlib.import_module(place))


def _from_file(place: str) -> Any:
    path = Path(place)
    if not path.is_file():
        raise FxmemError(f"no such file: {place}\n  accepted: file.py:callable")
    # A name of its own: the file may be called like a module that is loaded already.
    name = f"fxmem_cli_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its own folder, as if it were run as a script; registered, because pickle and Dynamo look.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[name] = module
    loader = spec.loader
    _user_code(place, lambda: loader.exec_module(module))
    return module


def _user_code(what: str, call: Callable[[], Any]) -> Any:
    """``call()``; what it raises becomes one message with the user's line in it."""
    try:
        return call()
    except FxmemError:
        raise
    # SystemExit too: a file that exits with 0 has not shown that its step fits.
    except (Exception, SystemExit) as error:
        raise FxmemError(
            f"{what} failed: {type(error).__name__}: {error}\n  at {_user_line(error)}"
        ) from error


def _user_line(error: BaseException) -> str:
    """The innermost line outside installed packages and Python's own import machinery."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not re.search(r"site-packages|<frozen|importlib", f.filename)]
    return f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}"


def _functions(module: Any) -> list[str]:
    """The functions that the module itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def _checked(spec: str, built: Any) -> Loaded:
    if isinstance(built, tuple) and len(built) in (2, 3) and isinstance(built[0], torch.nn.Module):
        model, args, *rest = built
        args = (args,) if isinstance(args, torch.Tensor) else args
        kwargs = rest[0] if rest else {}
        if isinstance(args, (tuple, list)) and isinstance(kwargs, dict):
            return model, tuple(args), kwargs
    raise FxmemError(
        f"{spec} returned {_kind(built)}\n"
        "  accepted: (model, example_inputs) or (model, example_args, example_kwargs), with an "
        "nn.Module, a tuple and a dict"
    )


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(type(part).__name__ for part in value) + ")"
    return type(value).__name__
