"""A recogniser: model, tokenizer and feature extractor of one folder, joined.

B  utterances   T  encoder frames   V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, ParakeetProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from manyvoice.data.features import LogMel
from manyvoice.data.tokens import Tokenizer
from manyvoice.errors import ModelError
from manyvoice.models.anatomy import Family
from manyvoice.models.load import fingerprint, load_model, resolve
from manyvoice.types import Padded, Seconds

# features B T F and their lengths to log-probabilities B T V with theirs
Scores = Callable[[Tensor, Tensor], Padded]


@final
class Recogniser:
    """What turns sound into scores and scores into text. Load it with :meth:`load`."""

    def __init__(
        self, model: PreTrainedModel, family: Family, tokenizer: Tokenizer, log_mel: LogMel, folder: Path | None = None
    ) -> None:
        if len(tokenizer) != model.config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens but the model scores {model.config.vocab_size}; "
                "they belong to different models"
            )
        self.model, self.family, self.tokenizer, self.log_mel = model, family, tokenizer, log_mel
        self.folder = folder
        self._scores: Scores | None = None

    @classmethod
    def load(cls, spec: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Recogniser:
        """By folder or hub id. ModelError if anything is missing or does not fit."""
        folder = resolve(spec)
        model, family = load_model(folder, dtype=dtype)
        model.to(torch.device(device))  # type: ignore[arg-type]  # Transformers wraps nn.Module.to untyped
        return cls(model, family, Tokenizer.load(folder), LogMel.load(folder), folder)

    def save(self, folder: Path) -> None:
        """A folder that stock Transformers loads: AutoModelForCTC, AutoProcessor, pipeline."""
        folder.mkdir(parents=True, exist_ok=True)
        blank = self.tokenizer.blank
        # Transformers draws a bar for a file that is written in a blink
        transformers_logging.disable_progress_bar()
        self.model.generation_config = GenerationConfig(pad_token_id=blank)
        self.model.save_pretrained(str(folder), safe_serialization=True)
        processor = ParakeetProcessor(
            self.log_mel.stock, self.tokenizer.stock, blank_token=self.tokenizer.strings[blank], decoder_type="ctc"
        )
        processor.save_pretrained(str(folder))

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def shift(self) -> Seconds:
        """Time from one encoder frame to the next."""
        return self.family.encoder_shift(self.model)

    def fingerprint(self) -> str:
        """sha256 of the weights."""
        return fingerprint(self.model)

    def encoder_frames(self, duration: Seconds) -> int:
        """Encoder frames of so many seconds of audio."""
        return self.family.encoder_frames(self.model, self.log_mel.frames(duration))

    def scored_by(self, scores: Scores) -> Recogniser:
        """The same recogniser, its log-probabilities from elsewhere, such as a runtime without torch."""
        other = Recogniser(self.model, self.family, self.tokenizer, self.log_mel, self.folder)
        other._scores = scores
        return other

    @torch.no_grad()
    def logp(self, features_BTF: Tensor, len_B: Tensor) -> Padded:
        """Log-probabilities B T V in evaluation mode."""
        if self._scores is not None:
            return self._scores(features_BTF, len_B)
        was_training = self.model.training
        self.model.eval()
        device, dtype = self.device, self.model.dtype
        encoded = self.family.encode(self.model, features_BTF.to(device, dtype), len_B.to(device))
        out = self.family.logits(self.model, encoded)
        self.model.train(was_training)
        return Padded(x=out.x.log_softmax(-1), len_B=out.len_B)

    def logp_of(self, samples: Sequence[np.ndarray]) -> Padded:
        """Log-probabilities of sounds given as samples at the model's rate."""
        features = [self.log_mel(samples_N) for samples_N in samples]
        len_B = torch.tensor([len(f) for f in features])
        return self.logp(pad_sequence(features, batch_first=True), len_B)
