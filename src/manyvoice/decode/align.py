"""CTC forced alignment: the most probable path that spells given tokens, and the words it places in time.

T encoder frames   U label tokens   V vocabulary, blank included   P places of a path: blank, token, blank, ..., blank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manyvoice.decode.pieces import WordBoundary, check_boundary, letters, opens_word
from manyvoice.errors import DecodeError
from manyvoice.types import Frames, Seconds

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Where each token lies; one entry of every field for each token.

    Args:
        tokens: the ids that were aligned.
        first, last: first and last frame of each token, both inside it.
        confidence: mean posterior of the token over its frames, 0 to 1.
        score: log-probability of the whole path.
    """

    tokens: tuple[int, ...]
    first: tuple[Frames, ...]
    last: tuple[Frames, ...]
    confidence: tuple[float, ...]
    score: float


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word in time; confidence is the mean posterior over the frames of its tokens, 0 to 1.

    Times are where the model emits the word's tokens. A CTC model emits each in a frame or two, with blanks between,
    so a word of one token spans a frame (40 ms, say) of the longer time for which it is spoken.
    """

    text: str
    start: Seconds
    end: Seconds
    confidence: float


def ctc_min_frames(tokens_U: Sequence[int]) -> int:
    """The fewest frames that can spell the tokens: one each, and a blank between two that are equal."""
    return len(tokens_U) + sum(a == b for a, b in zip(tokens_U, tokens_U[1:], strict=False))


def align(logp_TV: Tensor, tokens_U: Sequence[int], blank: int) -> Alignment:
    """The most probable path that collapses to the tokens (Viterbi). Graves et al., ICML 2006.

    No tokens give an empty alignment, scored as blanks throughout.

    Args: logp_TV: log-probabilities of one utterance, padding cut off.  tokens_U: label ids, no blanks.
    Raises: DecodeError if a token is no label, if the frames are too few (`ctc_min_frames`), or if no path can be.
    """
    _check(logp_TV, tokens_U, blank)
    logp = logp_TV.detach().double().cpu().numpy()
    label_P = np.full(2 * len(tokens_U) + 1, blank)
    label_P[1::2] = tokens_U
    emit_TP = logp[:, label_P]
    place_T, score = _viterbi(emit_TP, label_P, blank)
    if score == -np.inf:
        raise DecodeError(f"no path spells the {len(tokens_U)} tokens with a probability above zero")
    frames = np.arange(len(place_T))
    posterior_T = np.exp(emit_TP[frames, place_T])
    first, last, confidence = [], [], []
    for u in range(len(tokens_U)):
        mine = frames[place_T == 2 * u + 1]
        first.append(Frames(int(mine[0])))
        last.append(Frames(int(mine[-1])))
        confidence.append(float(posterior_T[mine].mean()))
    return Alignment(
        tokens=tuple(tokens_U), first=tuple(first), last=tuple(last), confidence=tuple(confidence), score=score
    )


def words(alignment: Alignment, token_strings: Sequence[str], boundary: WordBoundary, frame: Seconds) -> list[Word]:
    """Aligned tokens as words, from the first frame of a word's first letter to the last of its last.

    Args: token_strings: the string of each id.  boundary: see `pieces`.  frame: seconds per encoder frame.
    """
    if not frame > 0:
        raise DecodeError(f"frame must be the seconds of one encoder frame, above 0, but is {frame}")
    check_boundary([token_strings[token] for token in alignment.tokens], boundary)
    groups: list[list[int]] = []
    new = True
    for u, token in enumerate(alignment.tokens):
        piece = token_strings[token]
        new = new or opens_word(piece, boundary)
        # A lone word mark opens the word that follows, but the word begins with its first letter.
        if not letters(piece, boundary):
            continue
        if new:
            groups.append([])
        groups[-1].append(u)
        new = False
    return [_word(alignment, group, token_strings, boundary, frame) for group in groups]


def _word(
    alignment: Alignment, group: list[int], strings: Sequence[str], boundary: WordBoundary, frame: Seconds
) -> Word:
    held = [alignment.last[u] - alignment.first[u] + 1 for u in group]
    weighted = sum(alignment.confidence[u] * n for u, n in zip(group, held, strict=True))
    return Word(
        text="".join(letters(strings[alignment.tokens[u]], boundary) for u in group),
        start=Seconds(alignment.first[group[0]] * frame),
        end=Seconds((alignment.last[group[-1]] + 1) * frame),
        confidence=weighted / sum(held),
    )


def _viterbi(emit_TP: Floats, label_P: NDArray[np.int64], blank: int) -> tuple[NDArray[np.int64], float]:
    """The best place of each frame, and the log-probability of that path."""
    T, P = emit_TP.shape
    if T == 0:
        return np.zeros(0, dtype=np.int64), 0.0
    # A blank may be passed over between two labels, unless they are the same label.
    skips_P = np.zeros(P, dtype=bool)
    skips_P[2:] = (label_P[2:] != blank) & (label_P[2:] != label_P[:-2])
    best_P = np.full(P, -np.inf)
    best_P[:2] = emit_TP[0, :2]
    back_TP = np.zeros((T, P), dtype=np.int8)
    came_3P = np.full((3, P), -np.inf)
    for t in range(1, T):
        came_3P[0] = best_P
        came_3P[1, 1:] = best_P[:-1]
        came_3P[2, 2:] = np.where(skips_P[2:], best_P[:-2], -np.inf)
        back_TP[t] = came_3P.argmax(axis=0)
        best_P = came_3P.max(axis=0) + emit_TP[t]
    place = P - 1 if P == 1 or best_P[-1] >= best_P[-2] else P - 2
    score = float(best_P[place])
    place_T = np.empty(T, dtype=np.int64)
    for t in range(T - 1, -1, -1):
        place_T[t] = place
        place -= int(back_TP[t, place])
    return place_T, score


def _check(logp_TV: Tensor, tokens_U: Sequence[int], blank: int) -> None:
    if logp_TV.ndim != 2 or not logp_TV.is_floating_point():
        raise DecodeError(f"logp_TV must be a float tensor of T V, but is {logp_TV.dtype} of {tuple(logp_TV.shape)}")
    T, V = logp_TV.shape
    if not 0 <= blank < V:
        raise DecodeError(f"blank must be a token id below {V}, but is {blank}")
    for u, token in enumerate(tokens_U):
        if not 0 <= token < V or token == blank:
            raise DecodeError(f"tokens_U[{u}] is {token}, but must be a label id below {V} and not the blank ({blank})")
    if logp_TV.isnan().any():
        raise DecodeError("logp_TV holds NaN; the model or its input is broken")
    if (needed := ctc_min_frames(tokens_U)) > T:
        raise DecodeError(
            f"{len(tokens_U)} tokens need at least {needed} frames (a repeat needs a blank between), but there are {T};"
            " the transcript does not belong to this audio, or the encoder shortens it too much"
        )
