"""Best-path decoding of CTC: the most probable token of each frame, repeats collapsed, blanks dropped.

B utterances   T encoder frames   V vocabulary, blank included
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyvoice.errors import DecodeError
from manyvoice.types import mask_of


@dataclass(frozen=True, kw_only=True)
class BestPath:
    """Tokens of the most probable path, and the log-probability of that one path (not of all that spell the tokens)."""

    tokens: tuple[int, ...]
    score: float


def greedy(logp_BTV: Tensor, len_B: Tensor, blank: int) -> list[list[int]]:
    """Token ids of the best path of each utterance. Graves et al., ICML 2006, section 3.2.

    Args: logp_BTV: log-probabilities, any float type or device.  len_B: encoder frames, 0 <= len <= T.
    Raises: DecodeError, as `check_emissions` does.
    """
    return [list(path.tokens) for path in best_paths(logp_BTV, len_B, blank)]


def best_paths(logp_BTV: Tensor, len_B: Tensor, blank: int) -> list[BestPath]:
    """As `greedy`, with the score of each path: the sum of its frames' log-probabilities, in nats."""
    check_emissions(logp_BTV, len_B, blank)
    if logp_BTV.shape[1] == 0:
        return [BestPath(tokens=(), score=0.0) for _ in range(logp_BTV.shape[0])]
    best_BT, path_BT = logp_BTV.max(dim=-1)
    inside_BT = mask_of(len_B.to(logp_BTV.device), logp_BTV.shape[1])
    score_B = torch.where(inside_BT, best_BT, 0).double().sum(dim=1)
    kept_BT = inside_BT & (path_BT != blank)
    kept_BT[:, 1:] &= path_BT[:, 1:] != path_BT[:, :-1]
    rows = zip(path_BT.cpu(), kept_BT.cpu(), score_B.tolist(), strict=True)
    return [BestPath(tokens=tuple(path_T[kept_T].tolist()), score=score) for path_T, kept_T, score in rows]


def check_emissions(logp_BTV: Tensor, len_B: Tensor, blank: int) -> None:
    """Raises: DecodeError if the shapes, a length or the blank do not fit, or if a frame inside a length is NaN."""
    if logp_BTV.ndim != 3 or not logp_BTV.is_floating_point():
        raise DecodeError(
            f"logp_BTV must be a float tensor of B T V, but is {logp_BTV.dtype} of shape {tuple(logp_BTV.shape)}"
        )
    B, T, V = logp_BTV.shape
    if tuple(len_B.shape) != (B,):
        raise DecodeError(
            f"len_B must hold one length for each of the {B} utterances, but has shape {tuple(len_B.shape)}"
        )
    if not 0 <= blank < V:
        raise DecodeError(f"blank must be a token id below {V}, but is {blank}")
    for b, length in enumerate(len_B.tolist()):
        if not 0 <= length <= T:
            raise DecodeError(f"len_B[{b}] is {length}, but must lie between 0 and the {T} frames of logp_BTV")
    bad_B = (logp_BTV.isnan().any(dim=-1) & mask_of(len_B.to(logp_BTV.device), T)).any(dim=-1)
    if bad_B.any():
        b = int(bad_B.nonzero()[0])
        raise DecodeError(f"logp_BTV[{b}] holds NaN inside its length; the model or its input is broken")
