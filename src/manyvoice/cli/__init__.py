"""The command ``manyvoice``: one file per verb, thin over the Python functions of the same names.

Exit status: 0 done, 1 the work failed, 2 the words were wrong. With ``--json`` standard output holds one JSON
document and nothing else; progress and logs go to standard error.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Annotated

import typer

from manyvoice.errors import ManyvoiceError

app = typer.Typer(
    name="manyvoice",
    help="Speech models that are trained once, fit every device and every voice, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from manyvoice import __version__

        print(f"manyvoice {__version__}")
        raise typer.Exit


@app.callback()
def _any(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one this is, and end.")
    ] = False,
) -> None:
    """Speech models that are trained once, fit every device and every voice, and prove it."""


for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    _verb = importlib.import_module(f"manyvoice.cli.{_module}")
    if hasattr(_verb, "add_to"):
        _verb.add_to(app)


_INTERRUPTED = 130


def main() -> None:
    """Entry point: errors of ours become one message and an exit status."""
    # Transformers and the tokenizers' threads would otherwise write their own bars and warnings to standard error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except ManyvoiceError as error:
        print(f"manyvoice: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as error:
        # what Typer makes of Ctrl-C
        if error.code != _INTERRUPTED:
            raise
        print("manyvoice: stopped", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
