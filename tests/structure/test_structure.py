"""The shape of the source, held by rules: docs/architecture.md says why, every message says what to do.

A rule is a generator over the parsed package; below the rules, each is shown to fire on a planted violation.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "manyvoice"
MAP = "docs/architecture.md"

FILE_LINES, FILE_LINES_P90, FILE_LINES_LEAST = 600, 450, 25
FUNCTION_LINES, FUNCTION_LINES_P90, ARGUMENTS = 80, 40, 8
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file; ``path`` is relative to the folder of the package: ``data/buckets.py``."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        parts = [PACKAGE, *Path(self.path).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def functions(self) -> Iterator[tuple[Function, bool, bool]]:
        """Every function, with: is its first argument bound, is it public (all scopes around it are)."""

        def walk(node: ast.AST, in_class: bool, public: bool) -> Iterator[tuple[Function, bool, bool]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, Function):
                    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
                    shown = public and (
                        not child.name.startswith("_") or re.fullmatch("__.*__", child.name) is not None
                    )
                    yield child, in_class and not static, shown
                    yield from walk(child, False, False)
                elif isinstance(child, ast.ClassDef):
                    yield from walk(child, True, public and not child.name.startswith("_"))
                else:
                    yield from walk(child, in_class, public)

        return walk(self.tree, False, True)


Source = Mapping[str, Module]  # by module name
Rule = Callable[[Source], Iterator[str]]


def source_of(files: Mapping[str, str]) -> Source:
    modules = [Module(path, text) for path, text in sorted(files.items())]
    return {module.name: module for module in modules}


def layers_in(page: str) -> list[set[str]]:
    """The block of layers in the page, lowest first."""
    block = re.search(r"^```layers\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block, f"{MAP} must hold a block that starts with ```layers: the list that imports must follow"
    return [set(re.split(r",\s*", line.strip())) for line in reversed(block[1].splitlines())]


def imported_by(module: Module, source: Source) -> Iterator[tuple[str, ast.AST]]:
    """Names of our modules that a module imports anywhere in its text; ``__version__`` may be read by all."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.name.split(".") if module.path.endswith("__init__.py") else module.name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:
                    if (base, alias.name) != (PACKAGE, "__version__"):
                        yield (f"{base}.{alias.name}" if f"{base}.{alias.name}" in source else base), node
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and str(first.value).split(".")[0] == PACKAGE:
                yield str(first.value), node


def p90(numbers: list[int]) -> int:
    """The smallest number that nine in ten do not exceed; 0 of none."""
    return sorted(numbers)[math.ceil(0.9 * len(numbers)) - 1] if numbers else 0


def length_of(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def arguments_of(function: Function, bound: bool) -> list[ast.arg]:
    spec = function.args
    named = [*spec.posonlyargs, *spec.args][int(bound) :] + spec.kwonlyargs
    return named + [star for star in (spec.vararg, spec.kwarg) if star is not None]


# --- rules


def imports_point_down(source: Source, layers: list[set[str]] | None = None) -> Iterator[str]:
    layers = layers_in((ROOT / MAP).read_text("utf-8")) if layers is None else layers
    level = {name: i for i, layer in enumerate(layers) for name in layer}
    for module in source.values():
        if module.name in (PACKAGE, f"{PACKAGE}.__main__"):
            continue
        package = module.name.split(".")[1]
        if package not in level:
            yield f"{module.path}: {package!r} is in no layer; put it into the block of layers in {MAP}"
            continue
        for name, node in imported_by(module, source):
            target = (name.split(".") + [""])[1]
            if target == package:
                continue
            if not target:
                yield f"{module.at(node)} imports the public face of {PACKAGE}; import the module that defines the name"
            elif level.get(target, len(layers)) >= level[package]:
                yield (
                    f"{module.at(node)}: {package} must not import {name}, which is not below it in {MAP}; "
                    "pass it in as an argument, or move what is shared down"
                )


def no_import_cycles(source: Source) -> Iterator[str]:
    graph = {name: {n for n, _ in imported_by(module, source)} - {name} for name, module in source.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        ring = " -> ".join(reversed(error.args[1]))
        yield f"import cycle {ring}; move what they share into a module that both import"


def files_are_neither_huge_nor_crumbs(source: Source) -> Iterator[str]:
    for module in source.values():
        if module.lines > FILE_LINES:
            yield f"{module.path} has {module.lines} lines, at most {FILE_LINES}; split it where it holds a second idea"
        if module.lines < FILE_LINES_LEAST and not module.path.endswith(("__init__.py", "__main__.py")):
            yield f"{module.path} has {module.lines} lines, at least {FILE_LINES_LEAST}; join it to its user"
    if (tail := p90([module.lines for module in source.values()])) > FILE_LINES_P90:
        longest = sorted(source.values(), key=lambda m: -m.lines)[:5]
        names = ", ".join(f"{m.path} ({m.lines})" for m in longest)
        yield f"one file in ten has {tail} lines or more, at most {FILE_LINES_P90}; split the longest: {names}"


def functions_are_short(source: Source) -> Iterator[str]:
    found = [(length_of(f), f"{m.at(f)} {f.name}") for m in source.values() for f, _, _ in m.functions()]
    for lines, where in found:
        if lines > FUNCTION_LINES:
            yield f"{where} has {lines} lines, at most {FUNCTION_LINES}; give its steps names of their own"
    if (tail := p90([lines for lines, _ in found])) > FUNCTION_LINES_P90:
        names = ", ".join(f"{where} ({lines})" for lines, where in sorted(found, reverse=True)[:5])
        yield f"one function in ten has {tail} lines or more, at most {FUNCTION_LINES_P90}; split the longest: {names}"


def arguments_are_few(source: Source) -> Iterator[str]:
    for module in source.values():
        for function, bound, public in module.functions():
            command = module.path.startswith("cli/") and public and not bound
            count = len(arguments_of(function, bound))
            if count > ARGUMENTS and not command:
                yield f"{module.at(function)} {function.name} takes {count} arguments, at most {ARGUMENTS}; join some"


def public_arguments_are_annotated(source: Source) -> Iterator[str]:
    for module in source.values():
        for function, bound, public in module.functions():
            bare = [arg.arg for arg in arguments_of(function, bound) if arg.annotation is None]
            if public and bare:
                yield f"{module.at(function)} {function.name} does not say the type of {', '.join(bare)}; annotate it"


def names_say_what_is_inside(source: Source) -> Iterator[str]:
    for module in source.values():
        if empty := EMPTY_NAMES.intersection(Path(module.path).with_suffix("").parts):
            yield f"{module.path}: {empty.pop()!r} says nothing; name the module after what it holds"


def nothing_unpickles(source: Source) -> Iterator[str]:
    way_out = "can run code that a file carries; store tensors as safetensors and the rest as JSON"
    for module in source.values():
        for node in ast.walk(module.tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                pickler = (node.module or "").split(".")[0] in PICKLERS
                names = [f"{node.module}.{alias.name}" for alias in node.names if pickler or alias.name in PICKLERS]
                names += ["torch.load" for alias in node.names if (node.module, alias.name) == ("torch", "load")]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                names = ["torch.load"]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                refused = isinstance(node.value, ast.Constant) and node.value.value is False
                names = [] if refused else ["allow_pickle"]
            yield from (f"{module.at(node)}: {name} {way_out}" for name in names)


def nothing_is_unfinished(source: Source) -> Iterator[str]:
    for module in source.values():
        for number, line in enumerate(module.text.splitlines(), 1):
            if mark := re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line):
                yield f"{module.path}:{number}: {mark[0]} marks unfinished work; finish it or take it out"


RULES: list[Rule] = [
    imports_point_down,
    no_import_cycles,
    files_are_neither_huge_nor_crumbs,
    functions_are_short,
    arguments_are_few,
    public_arguments_are_annotated,
    names_say_what_is_inside,
    nothing_unpickles,
    nothing_is_unfinished,
]


@pytest.fixture(scope="module")
def source() -> Source:
    folder = ROOT / "src" / PACKAGE
    return source_of({p.relative_to(folder).as_posix(): p.read_text("utf-8") for p in sorted(folder.rglob("*.py"))})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source(rule: Rule, source: Source) -> None:
    broken = list(rule(source))
    assert not broken, "\n" + "\n".join(broken)


def test_the_source_is_found(source: Source) -> None:
    assert {PACKAGE, f"{PACKAGE}.types", f"{PACKAGE}.errors"} <= source.keys()


# --- the rules themselves: silent on good source, loud on a planted violation

PADDING = "\n" * FILE_LINES_LEAST
GOOD = {
    "__init__.py": "from manyvoice.data.plan import plan",
    "types.py": "from dataclasses import dataclass" + PADDING,
    "data/__init__.py": "",
    "data/plan.py": "from manyvoice.types import Batch\nfrom manyvoice import __version__\n"
    "from . import cuts\ndef plan(x: int, *rest: int) -> int:\n    return _inner(x)\ndef _inner(x): return x" + PADDING,
    "data/cuts.py": "import numpy as np\nnp.load('a', allow_pickle=False)" + PADDING,
    "models/anatomy.py": "class A:\n    def f(self, x: int) -> None: ...\n    @staticmethod\n    def g(x: int): ..."
    + PADDING,
    "train/loop.py": "def fit():\n    from manyvoice.data import plan\n    return plan" + PADDING,
    "cli/train.py": "def train(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, i: int): ..." + PADDING,
}
LONG = "def f():\n" + "    pass\n" * FUNCTION_LINES
LONGISH = "def f():\n" + "    pass\n" * FUNCTION_LINES_P90
PLANTED: list[tuple[Rule, dict[str, str], str]] = [
    (imports_point_down, {"data/a.py": "from manyvoice.train.loop import fit"}, "data must not import manyvoice.train"),
    (imports_point_down, {"data/a.py": "def f():\n    import manyvoice.train"}, "a.py:2: data must not import"),
    (imports_point_down, {"data/a.py": "if TYPE_CHECKING:\n    from ..train import loop"}, "data must not import"),
    (imports_point_down, {"data/a.py": "from ..models.anatomy import A"}, "not import manyvoice.models.anatomy"),
    (imports_point_down, {"data/a.py": "import_module('manyvoice.cli')"}, "data must not import manyvoice.cli"),
    (imports_point_down, {"decode/a.py": "from manyvoice.elastic import subnet"}, "decode must not import"),
    (imports_point_down, {"types.py": "from manyvoice.errors import E"}, "types must not import manyvoice"),
    (imports_point_down, {"data/a.py": "from manyvoice import nowhere"}, "imports the public face"),
    (imports_point_down, {"attic/a.py": ""}, "'attic' is in no layer"),
    (
        no_import_cycles,
        {"data/cuts.py": "def f():\n    from manyvoice.data.plan import plan"},
        "data.cuts -> manyvoice.data",
    ),
    (no_import_cycles, {"data/__init__.py": "from .cuts import a", "data/cuts.py": "from . import b"}, "import cycle"),
    (files_are_neither_huge_nor_crumbs, {"data/a.py": "\n" * (FILE_LINES + 1)}, "a.py has 601 lines"),
    (files_are_neither_huge_nor_crumbs, {"data/a.py": "x = 1"}, "a.py has 1 lines, at least 25"),
    (
        files_are_neither_huge_nor_crumbs,
        {f"data/{i}.py": "\n" * (FILE_LINES_P90 + 1) for i in range(2)},
        "one file in ten has 451 lines",
    ),
    (functions_are_short, {"data/a.py": LONG}, "a.py:1 f has 81 lines, at most 80"),
    (functions_are_short, {f"data/{i}.py": LONGISH for i in range(2)}, "one function in ten has 41 lines"),
    (arguments_are_few, {"data/a.py": "def f(a, b, c, d, e, f, g, *, h, **i): ..."}, "f takes 9 arguments"),
    (arguments_are_few, {"data/a.py": "class A:\n    def f(s, a, b, c, d, e, f, g, h, i): ..."}, "f takes 9 arguments"),
    (arguments_are_few, {"cli/a.py": "def _f(a, b, c, d, e, f, g, h, i): ..."}, "_f takes 9 arguments"),
    (public_arguments_are_annotated, {"data/a.py": "def f(a: int, *b): ..."}, "f does not say the type of b"),
    (public_arguments_are_annotated, {"data/a.py": "class A:\n    def __init__(self, a): ..."}, "the type of a"),
    (names_say_what_is_inside, {"data/utils.py": ""}, "'utils' says nothing"),
    (names_say_what_is_inside, {"misc/a.py": ""}, "'misc' says nothing"),
    (
        nothing_unpickles,
        {"data/a.py": "import torch\nx = torch.load('x', weights_only=True)"},
        "a.py:2: torch.load can run",
    ),
    (nothing_unpickles, {"data/a.py": "def f():\n    import pickle as p"}, "pickle can run"),
    (nothing_unpickles, {"data/a.py": "from torch import load"}, "torch.load can run"),
    (nothing_unpickles, {"data/a.py": "from dill import loads"}, "dill.loads can run"),
    (nothing_unpickles, {"data/a.py": "np.load(f, allow_pickle=True)"}, "allow_pickle can run"),
    (nothing_is_unfinished, {"data/a.py": "x = 1  # TODO: more"}, "a.py:1: TODO marks unfinished"),
    (nothing_is_unfinished, {"data/a.py": "raise NotImplementedError"}, "NotImplementedError marks unfinished"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_is_silent_on_good_source(rule: Rule) -> None:
    assert list(rule(source_of(GOOD))) == []


@pytest.mark.parametrize("rule,files,message", PLANTED, ids=lambda x: getattr(x, "__name__", None))
def test_a_rule_finds_a_planted_violation(rule: Rule, files: dict[str, str], message: str) -> None:
    broken = list(rule(source_of(GOOD | files)))
    assert any(message in line for line in broken), broken


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_the_layers_are_read_from_the_map() -> None:
    assert layers_in("a\n```layers\ncli\ndata, models\ntypes\n```\nb") == [{"types"}, {"data", "models"}, {"cli"}]
    with pytest.raises(AssertionError, match="must hold a block"):
        layers_in("no block")
