"""The nouns every layer shares, and the legend of dimension letters.

A tensor's name ends in its dimensions: ``features_BTF`` has utterances, frames, features.

    B  utterances in a batch          T  frames (10 ms at the input, encoder frames after it)
    F  features of a frame (mel bins) U  label tokens
    V  vocabulary, blank included     D  model width
    H  attention heads                K  width of a head
    S  submodels in a bank            R  rank
    I  input width                    O  output width
    N  samples of audio, or states of a state-space model
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NewType

import torch
from torch import Tensor

Seconds = NewType("Seconds", float)
Frames = NewType("Frames", int)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Sequences of unequal length in one tensor.

    Args: x: B T ..., anything after each length.  len_B: int64, 1 <= len <= T.
    """

    x: Tensor
    len_B: Tensor

    def mask_BT(self) -> Tensor:
        """B T, True inside the utterance."""
        return mask_of(self.len_B, self.x.shape[1])


def mask_of(len_B: Tensor, T: int) -> Tensor:
    """B T, True at the first ``len_B[b]`` places of row b."""
    return torch.arange(T, device=len_B.device) < len_B[:, None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What training, scoring and decoding are fed.

    Args:
        ids: one name per utterance.
        features_BTF: log-mel of the model's own feature extractor, zeros after each length.
        len_B: feature frames of each utterance, int64.
        tokens_BU: label tokens, int64, zeros after each length; no blanks, no special tokens.
        token_len_B: label tokens of each utterance, int64.
        owner_B: the submodel row each utterance belongs to, int64; 0 is the base.
        label_B: class of each utterance for classification, int64; -1 is none.
        seconds_B: duration of each utterance, float64.
        cell: of the plan's bins, whose batch size bounds this batch; -1 where there is no plan.
    """

    ids: tuple[str, ...]
    features_BTF: Tensor
    len_B: Tensor
    tokens_BU: Tensor
    token_len_B: Tensor
    owner_B: Tensor
    label_B: Tensor
    seconds_B: Tensor
    cell: int = -1

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, start: int, stop: int) -> Batch:
        """Utterances ``start`` to ``stop`` as a batch of their own, padded no more than they need."""
        if (start, stop) == (0, len(self)):
            return self
        part = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cell"}
        part = {name: v[start:stop] for name, v in part.items()}
        part["features_BTF"] = part["features_BTF"][:, : int(part["len_B"].max())]
        part["tokens_BU"] = part["tokens_BU"][:, : int(part["token_len_B"].max())]
        return Batch(cell=self.cell, **part)

    def owned(self, owner_B: Tensor) -> Batch:
        """The same batch with these owners."""
        return replace(self, owner_B=owner_B)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on another device, its features in another precision."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
        batch = replace(self, **moved)
        return batch if dtype is None else replace(batch, features_BTF=batch.features_BTF.to(dtype))
