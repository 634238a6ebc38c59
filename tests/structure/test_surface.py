"""What users write against, frozen: the public names, and the verbs and flags of the command line.

Run as a program, this file writes the command line's surface: ``python tests/structure/test_surface.py``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[2]
API_PAGE = ROOT / "docs" / "api.md"
FROZEN = Path(__file__).with_name("cli_surface.txt")
WAY_OUT = "if that is meant: python tests/structure/test_surface.py, and commit the change of cli_surface.txt"


def public_names(module: ModuleType) -> set[str]:
    """What ``dir`` shows of a module but its submodules, which any import adds, and what every typed module has."""
    shown = {name for name in dir(module) if not name.startswith("_")} - {"annotations", "TYPE_CHECKING"}
    return {name for name in shown if not is_submodule(getattr(module, name), module)}


def is_submodule(value: object, module: ModuleType) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith(f"{module.__name__}.")


def unwritten(names: Iterable[str], page: str) -> list[str]:
    """The names that the page never mentions in code."""
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", page, re.DOTALL))
    return sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", code))


def surface(command: Any, path: str) -> Iterator[str]:
    """A line for each verb, its arguments as they follow each other, its flags with all spellings by name."""
    yield path
    yield from (f"{path} {param.name.upper()}" for param in command.params if param.param_type_name == "argument")
    flags = [param for param in command.params if param.param_type_name != "argument"]
    yield from sorted(f"{path} {' '.join([*flag.opts, *flag.secondary_opts])}" for flag in flags)
    if hasattr(command, "list_commands"):
        context = command.context_class(command)
        for name in sorted(command.list_commands(context)):
            yield from surface(command.get_command(context, name), f"{path} {name}")


def surface_of_app() -> list[str] | None:
    """The lines of the installed command line; None while it has no ``app``."""
    app = getattr(importlib.import_module("manyvoice.cli"), "app", None)
    return None if app is None else list(surface(typer.main.get_command(app), "manyvoice"))


def test_public_names() -> None:
    manyvoice = importlib.import_module("manyvoice")
    promised = getattr(manyvoice, "__all__", None)
    assert promised is not None, "src/manyvoice/__init__.py has no __all__; list the public names there"
    missing = [name for name in promised if not hasattr(manyvoice, name)]
    assert not missing, f"__all__ promises {missing}, which manyvoice does not have"
    assert len(promised) == len(set(promised)), "__all__ names something twice"
    strays = public_names(manyvoice) - set(promised)
    assert not strays, (
        f"new public names {sorted(strays)}? add them to __all__ and to docs/api.md, or begin them with _"
    )


def test_public_names_are_written_down() -> None:
    if not API_PAGE.exists():
        pytest.skip("there is no docs/api.md yet")
    names = getattr(importlib.import_module("manyvoice"), "__all__", ())
    missing = unwritten(names, API_PAGE.read_text("utf-8"))
    assert not missing, f"docs/api.md does not mention {missing}; write what they do, in `code`"


def test_command_line() -> None:
    lines = surface_of_app()
    if lines is None:
        pytest.skip("manyvoice.cli has no app yet")
    assert FROZEN.exists(), f"{FROZEN.name} is missing; {WAY_OUT}"
    frozen = FROZEN.read_text("utf-8").splitlines()
    gained, lost = sorted(set(lines) - set(frozen)), sorted(set(frozen) - set(lines))
    assert lines == frozen, f"the command line gained {gained} and lost {lost}; {WAY_OUT}"


# --- the checks themselves see what they should


def test_a_stray_name_is_seen_and_a_submodule_is_not() -> None:
    module = ModuleType("pack")
    vars(module).update(part=ModuleType("pack.part"), torch=ModuleType("torch"), thing=1, _hidden=2, annotations=3)
    assert public_names(module) == {"torch", "thing"}


def test_a_name_counts_as_written_only_in_code() -> None:
    assert unwritten(["load", "fit"], "`manyvoice.load(path)` reads; to fit is human; `outfit`") == ["fit"]
    assert unwritten(["fit"], "```python\nfit(model)\n```") == []


def test_verbs_arguments_and_flags_are_all_walked() -> None:
    app, voices = typer.Typer(add_completion=False), typer.Typer()
    app.add_typer(voices, name="voices")

    @app.command()
    def train(run: str, also: str, dry_run: bool = False, steps: int = typer.Option(1, "--steps", "-n")) -> None: ...

    @voices.command("ls")
    def ls(store: str) -> None: ...

    assert list(surface(typer.main.get_command(app), "mv")) == [
        "mv",
        "mv train",
        "mv train RUN",
        "mv train ALSO",
        "mv train --dry-run --no-dry-run",
        "mv train --steps -n",
        "mv voices",
        "mv voices ls",
        "mv voices ls STORE",
    ]


if __name__ == "__main__":
    written = surface_of_app()
    if written is None:
        raise SystemExit("manyvoice.cli has no app yet")
    FROZEN.write_text("".join(f"{line}\n" for line in written), "utf-8")
    print(f"{FROZEN}: {len(written)} lines")
