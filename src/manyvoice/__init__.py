"""Speech models that are trained once, fit every device and every voice, and prove it.

The public names; each is loaded when it is first used, so that ``import manyvoice`` is quick.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Python binds a subpackage's name here when it is first imported. This one's is also a function's, which must stay.
_import_module("manyvoice.train")
del globals()["train"]

if TYPE_CHECKING:
    from manyvoice.config import RunConfig, make_run, read_run
    from manyvoice.data.check import check
    from manyvoice.data.importers import import_corpus
    from manyvoice.data.join import join_clips
    from manyvoice.data.manifest import Corpus, open_corpus
    from manyvoice.data.synth import SynthSpec, synthesise, synthesise_splits
    from manyvoice.data.utterance import Utterance
    from manyvoice.decode.compare import Arm, compare
    from manyvoice.decode.evaluate import Evaluation, evaluate
    from manyvoice.decode.recogniser import Recogniser
    from manyvoice.errors import ManyvoiceError
    from manyvoice.models.anatomy import anatomy_of
    from manyvoice.recipes.card import check_model
    from manyvoice.recipes.personalize import Personalisation, personalize
    from manyvoice.recipes.sizes import load_size
    from manyvoice.recipes.train import train
    from manyvoice.recipes.transcribe import Transcript, transcribe
    from manyvoice.recipes.voiced import load_voiced
    from manyvoice.submodels.store import Store
    from manyvoice.submodels.voice import Voice

_WHERE = {
    "Arm": "decode.compare",
    "Corpus": "data.manifest",
    "Evaluation": "decode.evaluate",
    "ManyvoiceError": "errors",
    "Personalisation": "recipes.personalize",
    "Recogniser": "decode.recogniser",
    "RunConfig": "config",
    "Store": "submodels.store",
    "SynthSpec": "data.synth",
    "Transcript": "recipes.transcribe",
    "Utterance": "data.utterance",
    "Voice": "submodels.voice",
    "anatomy_of": "models.anatomy",
    "check": "data.check",
    "check_model": "recipes.card",
    "compare": "decode.compare",
    "evaluate": "decode.evaluate",
    "import_corpus": "data.importers",
    "join_clips": "data.join",
    "load_size": "recipes.sizes",
    "load_voiced": "recipes.voiced",
    "make_run": "config",
    "open_corpus": "data.manifest",
    "personalize": "recipes.personalize",
    "read_run": "config",
    "synthesise": "data.synth",
    "synthesise_splits": "data.synth",
    "train": "recipes.train",
    "transcribe": "recipes.transcribe",
}

__all__ = [
    "Arm",
    "Corpus",
    "Evaluation",
    "ManyvoiceError",
    "Personalisation",
    "Recogniser",
    "RunConfig",
    "Store",
    "SynthSpec",
    "Transcript",
    "Utterance",
    "Voice",
    "anatomy_of",
    "check",
    "check_model",
    "compare",
    "evaluate",
    "import_corpus",
    "join_clips",
    "load_size",
    "load_voiced",
    "make_run",
    "open_corpus",
    "personalize",
    "read_run",
    "synthesise",
    "synthesise_splits",
    "train",
    "transcribe",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'manyvoice' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value: object = getattr(_import_module(f"manyvoice.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
