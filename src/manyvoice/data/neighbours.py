"""Batches of neighbours in the (duration, tokens) plane, around places drawn anew in each epoch; no fixed bins.

The plane is cut into strips of like duration, each strip by tokens into batches. Where the strips begin is drawn at
random, and durations and tokens are shaken a little before they are sorted, so batch mates change with the epoch.
Padding then depends on how densely the plane is filled, not on how many bins somebody chose.

    N  utterances
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# seconds and tokens of the longest of each batch, to how many utterances fit; no more for a longer one
Capacity = Callable[[np.ndarray, np.ndarray], np.ndarray]

# What padding of tokens costs beside padding of frames: the model's body sees frames only.
TOKENS_WEIGHT = 0.6
# How far durations are shaken, in widths of a strip: more mixes batches better and pads more.
SHAKE = 0.05
_WIDTHS = np.asarray([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
_SAMPLE = 64


def neighbourhoods(
    durations_N: np.ndarray, tokens_N: np.ndarray, capacity: Capacity, rng: np.random.Generator
) -> list[np.ndarray]:
    """Every utterance once, in batches within their capacity; consecutive batches are similar.

    Args: capacity: of a batch by its longest duration and most tokens, at least 1 and never more for a larger shape.
    """
    count = len(durations_N)
    if count == 0:
        return []
    strips = max(1.0, float((1.0 / capacity(durations_N, tokens_N)).sum()) ** 0.5)
    order = _shaken(durations_N, SHAKE * float(np.ptp(np.log(durations_N))) / strips, rng)[::-1]
    found: list[np.ndarray] = []
    start = 0
    phase = rng.uniform(0.25, 1.0)  # of the first strip; all later ones begin where the one before ends
    while start < count:
        longest = order[start]
        room = int(capacity(durations_N[longest : longest + 1], tokens_N[longest : longest + 1])[0])
        width = _width(order[start:], room, durations_N, tokens_N)
        length = max(1, round(room * width * (phase if start == 0 else 1.0)))
        strip = _cut(order[start : start + length], width, durations_N, tokens_N, capacity, rng)
        # a strip runs down or up its tokens, so that neighbours in the list are neighbours in the plane
        found += strip if len(found) % 2 else strip[::-1]
        start += sum(map(len, strip))
    return found


def _width(rest: np.ndarray, room: int, durations_N: np.ndarray, tokens_N: np.ndarray) -> int:
    """Batches of the strip that begins here, so that its padding of frames and of tokens together is least.

    A wide strip pads frames, by half of what durations differ in it; a narrow one is cut into few parts by tokens.
    """
    best, cheapest = 1, np.inf
    for width in _WIDTHS[(_WIDTHS == 1) | (_WIDTHS * room <= len(rest))]:
        some = rest[: width * room : max(1, width * room // _SAMPLE)]
        seconds, tokens = durations_N[some], np.sort(tokens_N[some])
        # the most tokens of each part against the mean of all
        tops = tokens[np.ceil(np.arange(1, width + 1) * len(tokens) / width).astype(int) - 1]
        frames_lost = 1.0 - seconds.mean() / seconds.max()
        tokens_lost = 1.0 - tokens.mean() / max(tops.mean(), 1e-9)
        if frames_lost + TOKENS_WEIGHT * tokens_lost < cheapest:
            best, cheapest = int(width), frames_lost + TOKENS_WEIGHT * tokens_lost
    return best


def _cut(
    strip: np.ndarray,
    parts: int,
    durations_N: np.ndarray,
    tokens_N: np.ndarray,
    capacity: Capacity,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """The strip, or as much of its beginning as fits, by tokens in parts of equal size."""
    while True:
        part_of = strip[_shaken(tokens_N[strip] + 1.0, 0.5 / max(1, len(strip)) ** 0.5, rng)]
        cut = [part for part in np.array_split(part_of, min(parts, len(strip))) if len(part)]
        rooms = capacity(
            np.asarray([durations_N[part].max() for part in cut]), np.asarray([tokens_N[part].max() for part in cut])
        )
        short = max(len(part) / int(room) for part, room in zip(cut, rooms, strict=True))
        if short <= 1.0:
            return cut
        # what is left over begins the next strip: full batches cost less than one more that is not
        strip = strip[: max(1, min(len(strip) - 1, int(len(strip) / short)))]


def _shaken(values: np.ndarray, by: float, rng: np.random.Generator) -> np.ndarray:
    """Ascending order of positive values after each is multiplied by exp(uniform within ``by``)."""
    return np.argsort(np.log(values) + rng.uniform(-by, by, len(values)), kind="stable")
