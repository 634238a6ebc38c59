"""``manyvoice voices``: what a store of voices holds, and what goes into it and out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from manyvoice.cli.console import check_verb, emit, table
from manyvoice.errors import UsageError

_DOES = {"ls": (0, 0), "show": (1, 1), "add": (1, 1), "rm": (1, None), "export": (1, 1), "import": (1, None),
         "rebuild": (0, 0)}  # fmt: skip
_WANTS = {"show": "a name", "add": "one file", "rm": "names", "export": "a name", "import": "files"}


def voices(
    store: Annotated[str, typer.Argument(help="Folder or URL (s3://, gs://) of a store of voices.")],
    verb: Annotated[
        str, typer.Argument(help="ls, show NAME, add FILE, rm NAME..., export NAME, import FILE..., rebuild.")
    ] = "ls",
    what: Annotated[list[str] | None, typer.Argument(help="Names in the store, or voice files.")] = None,
    name: Annotated[str | None, typer.Option(help="That add gives; else the speaker's, or the file's.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose voices; tenants share nothing.")] = "default",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File that export writes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """List the voices of a store, show one, add, remove, export or import them.

    `rebuild` makes this machine's list of them again from the files, and clears away what interrupted programs left.

    Example: manyvoice voices runs/mine/voices show ann
    """
    from manyvoice.recipes import voices as recipe
    from manyvoice.submodels.store import Store

    words = _checked(store, verb, what or [], name=name, output=output)
    opened = Store(store)
    if verb == "ls":
        found = recipe.list_voices(opened, tenant)
        if as_json or not found["voices"]:
            others = ", ".join(map(_printable, found.get("tenants", ()))) or "none"
            emit(found, as_json=as_json, text=f"no voices of tenant {_printable(tenant)}; tenants here: {others}")
        else:
            _show_table(found["voices"])
    elif verb == "show":
        shown = recipe.show_voice(opened, words[0], tenant)
        emit(shown, as_json=as_json, text=_lines(shown))
    elif verb in ("add", "import"):
        added = recipe.add_voices(opened, [Path(word) for word in words], tenant, name=name)
        emit({"added": added}, as_json=as_json, text="\n".join(map(_added, added)))
    elif verb == "rm":
        removed = recipe.remove_voices(opened, words, tenant)
        emit({"removed": removed}, as_json=as_json, text="\n".join(map(_removed, removed)))
    elif verb == "rebuild":
        opened.rebuild()
        counts = {whose: len(opened.entries(whose)) for whose in opened.tenants()}
        text = ", ".join(f"{n} voices of {_printable(whose)}" for whose, n in counts.items()) or "no voices"
        emit({"voices": counts}, as_json=as_json, text=f"{store}: the list was made again; {text}")
    else:
        done = recipe.export_voice(opened, words[0], tenant, output)
        emit(done, as_json=as_json, text=f"{done['file']}: {done['hash']}, {done['bytes'] / 1e3:.1f} kB")


def _checked(store: str, verb: str, words: list[str], *, name: str | None, output: Path | None) -> list[str]:
    check_verb("voices", store, verb, _DOES)
    least, most = _DOES[verb]
    if len(words) < least or (most is not None and len(words) > most):
        wants = _WANTS.get(verb, "nothing more")
        many = "; `import` takes many files" if verb == "add" and words else ""
        raise UsageError(f"voices {verb}: wants {wants}, but got {' '.join(words) or 'nothing'}{many}")
    if name is not None and verb != "add":
        raise UsageError(f"voices {verb} --name {name}: only add takes a name; leave --name out")
    if output is not None and verb != "export":
        raise UsageError(f"voices {verb} --output {output}: only export writes a file; leave --output out")
    return words


def _show_table(entries: Sequence[dict[str, Any]]) -> None:
    from manyvoice.recipes.voices import error_rates

    rows = []
    for entry in entries:
        card, rates = entry["card"], error_rates(entry["card"])
        cells = [
            entry["name"],
            entry["method"],
            entry["base"][:12],
            f"{entry['bytes'] / 1e3:.1f}",
            card.get("speaker") or "",
            card.get("licence") or "",
            f"{rates[0]:.2%} -> {rates[1]:.2%}" if rates else "",
        ]
        # a name may hold what a terminal, or the table, would take for a command
        rows.append([escape(_printable(str(cell))) for cell in cells])
    columns = ["name", "method", "base", "kB", "speaker", "licence", "WER"]
    again = all(entry["card"].get("speaker") in (None, entry["name"]) for entry in entries)
    # never the name, which rm and show want
    spare = dict.fromkeys(["licence", *(["speaker"] if again else []), "base", "kB", "method", "speaker"])
    table("", columns, rows, spare=list(spare))
    for entry in entries:
        if entry["problem"]:
            print(f"damaged: {_printable(entry['name'])}: {_printable(entry['problem'])}")


def _lines(shown: dict[str, Any]) -> str:
    """Of a voice, a line for each thing it says of itself, its card's last."""
    method = shown["method"] + (f" ({_plain(shown['settings'])})" if shown["settings"] else "")
    first = {k: v for k, v in shown.items() if k not in ("settings", "card")}
    first |= {"added": str(shown["added"])[:19].replace("T", " "), "method": method}
    first |= {"parameters": str(shown["parameters"]), "bytes": f"{shown['bytes'] / 1e3:.1f} kB"}
    told = [(key, _plain(value)) for key, value in first.items()]
    card = [(f"  {key}", _plain(value, key)) for key, value in shown["card"].items()]
    wide = max(len(key) for key, _ in [*told, *card])
    lines = [*told, ("card", "" if card else "says nothing"), *card]
    return "\n".join(_printable(f"{key:<{wide}}  {value}".rstrip()) for key, value in lines)


def _plain(value: object, key: str = "") -> str:
    """A value of a card for people: error rates in per cent, other fractions with four digits."""
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2%}" if re.fullmatch(r"(.*_)?[wc]er", key) else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_within(v, str(k))}" for k, v in value.items()) or "nothing"
    if isinstance(value, list | tuple):
        between = " to " if key.endswith("interval") else ", "
        return between.join(_within(v, key) for v in value) or "none"
    return str(value)


def _within(value: object, key: str) -> str:
    nested = isinstance(value, Mapping | list | tuple) and not key.endswith("interval")
    return f"({_plain(value, key)})" if nested else _plain(value, key)


def _added(one: dict[str, Any]) -> str:
    was = f", in place of {one['replaced'][:12]}" if one["replaced"] else ""
    return f"{_printable(one['name'])}: {one['hash'][:12]}{was}"


def _removed(one: dict[str, Any]) -> str:
    what = f"voice {one['hash'][:12]} and its name are gone" if one["gone"] and one["hash"] else "its name is gone"
    note = f"; {one['note']}" if one["note"] else ""
    return f"{_printable(one['name'])}: {what}{note}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(voices)
