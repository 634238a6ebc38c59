"""``manyvoice subnets``: the sizes of a supernet listed, shown, compared and extracted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, check_verb, emit, table
from manyvoice.errors import UsageError

Model = Annotated[str, typer.Argument(help="Model folder of a supernet.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
_DOES = ("ls", "show", "compare", "extract", "find")


def subnets(
    model: Model,
    verb: Annotated[str, typer.Argument(help="ls, show SIZE, compare [MANIFEST], extract SIZE, find MANIFEST.")] = "ls",
    what: Annotated[str | None, typer.Argument(help="A size, or the manifest to compare on.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder that extract writes.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG that compare draws: error rate against MACs.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure how fast each size runs here.")] = True,
    budget: Annotated[float, typer.Option(help="That find may spend.")] = 0.5,
    of: Annotated[str, typer.Option(help="macs (a share), parameters, or latency (ms for 10 s here).")] = "macs",
    search: Annotated[int, typer.Option(min=0, help="Random subnets that find tries beside the uniform one.")] = 0,
    test: Annotated[Path | None, typer.Option(help="Manifest that find reports on, not the one it chooses on.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Add what find has found to the sizes.")] = False,
    as_json: AsJson = False,
) -> None:
    """List a supernet's sizes, show what one keeps, compare them, write one as a model, or find one for a budget.

    Example: manyvoice subnets runs/mine/model extract 40 --output phone/
    """
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes import sizes
    from manyvoice.recipes.find import KINDS, Budget, find_sizes

    check_verb("subnets", model, verb, _DOES)
    if verb == "find":
        if of not in KINDS:
            kinds = ", ".join(KINDS)
            raise UsageError(f"subnets find --of {of}: must be {kinds}; for example --budget 50 --of latency")
        if what is None:
            raise UsageError(
                "subnets find: name a manifest to measure on; for example: "
                f"manyvoice subnets {model} find dev.jsonl --budget 50 --of latency"
            )
        with Terminal() as terminal:
            wanted = Budget(limit=budget, of=of)
            rows = find_sizes(
                model, open_corpus(what), wanted, tries=search, keep=keep, watcher=terminal,
                test=None if test is None else open_corpus(test),
            )  # fmt: skip
        _show_found(rows, of, as_json=as_json)
        return
    if verb in ("show", "extract") and what is None:
        raise UsageError(f"subnets {verb}: name a size, such as {verb} 55; `manyvoice subnets {model} ls` lists them")
    if verb == "ls":
        _show_table(sizes.compare_sizes(model, None, speed=False), as_json=as_json)
    elif verb == "show":
        from manyvoice.decode.recogniser import Recogniser

        recogniser = Recogniser.load(model)
        found, largest = sizes.find_size(recogniser, str(what)), sizes.all_sizes(recogniser)[0]
        text = sizes.describe(found, largest, recogniser.family.anatomy(recogniser.model))
        emit(found.document, as_json=as_json, text=text)
    elif verb == "extract":
        folder = output or Path(f"{Path(model).name}-{str(what).rstrip('%')}")
        card = sizes.extract_size(model, str(what), folder)
        emit({"folder": str(folder), **card}, as_json=as_json, text=f"{folder}: {card['parameters']} parameters")
    else:
        from manyvoice.recipes import pareto

        if plot is not None:
            pareto.check_plot(plot)
        with Terminal() as terminal:
            corpus = None if what is None else open_corpus(what)
            rows = sizes.compare_sizes(model, corpus, speed=speed, watcher=terminal)
        if plot is not None:
            pareto.draw({"sizes": [(r["layer_macs_share"], r["wer"], r["wer_interval"]) for r in rows]}, plot)
        _show_table(rows, as_json=as_json)


def _show_table(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        emit({"sizes": rows}, as_json=True, text="")
        return
    columns = ["size", "M params", "MACs", "GMACs", "WER", "95 % interval"]
    on = sorted({row["measured_on"] for row in rows} - {"what was given"})
    apart = len(on) > 1
    columns[4] += f" on {on[0]}" if on and not apart else ""
    columns += ["on"] if apart else []
    fast = "times_real_time" in rows[0]
    drawn = []
    for row in rows:
        interval = row["wer_interval"]
        cells = [
            row["size"], f"{row['parameters'] / 1e6:.2f}", f"{row['layer_macs_share']:.0%}", f"{row['macs'] / 1e9:.2f}",
            f"{row['wer']:.2%}", f"{100 * interval[0]:.1f} to {interval[1]:.1%}" if interval else "",
            *([row["measured_on"]] if apart else []),
        ]  # fmt: skip
        drawn.append([*cells, f"{row['times_real_time']:.0f}"] if fast else cells)
    note = "MACs: share of the layers' MACs; GMACs: in 10 s of sound"
    if fast:
        columns, note = [*columns, "x real time"], f"{note}; x real time: on one thread"
    table("", columns, drawn, note=note)


def _show_found(rows: list[dict[str, Any]], of: str, *, as_json: bool) -> None:
    if as_json:
        emit({"found": rows}, as_json=True, text="")
        return
    timed = of == "latency"
    columns = ["how", *(["time for 10 s"] if timed else []), "MACs of layers", "M params", "WER", "tried"]
    drawn = []
    for r in rows:
        costs = [*([f"{r['taken']:.1f} ms"] if timed else []), f"{r['share']:.0%}", f"{r['parameters'] / 1e6:.2f}"]
        drawn.append([r["how"], *costs, f"{r['wer']:.2%}", r["tried"]])
    table("", columns, drawn)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(subnets)
