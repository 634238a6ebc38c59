"""CTC prefix beam search with n-gram fusion and hotwords.

Hannun et al., arXiv:1408.2873, algorithm 1; Graves and Jaitly, ICML 2014. A hypothesis is a prefix of labels; the
probabilities of all its alignments are added up, kept apart by whether they end in a blank. Prefixes are ranked by

    score = am + lm_weight * lm + word_score * words + hotword bonus        (natural logarithms)

Why not flashlight-text: its lexicon-free decoder takes a Python language model but asks it once for each hypothesis
and token, before pruning: 2.6 utterances/s at 100 frames, 256 tokens, beam 16 and 40 tokens a frame, and 49 with no
model at all, where this file does 30 and 70 (random emissions, one core); its compiled KenLM binding has neither
hotwords nor words without a lexicon. Here a frame is a few numpy calls on hypotheses x tokens, and the language model
answers for all tokens at once.

    B utterances   T encoder frames   V vocabulary, blank included   W hypotheses kept   C tokens tried in a frame
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manyvoice.decode.fusion import Fusion, Hotwords, Part, TokenModel, WordModel, WordScore
from manyvoice.decode.greedy import check_emissions
from manyvoice.decode.lm import NGram
from manyvoice.decode.pieces import WordBoundary, check_boundary, spell
from manyvoice.errors import DecodeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """How to search. All weights are in nats.

    Args:
        beam: prefixes kept after each frame.
        lm_weight: multiplies the natural logarithm that the language model gives.
        word_score: added for each word, against the language model's liking for few words.
        hotwords: phrase -> bonus, spelled as the tokenizer spells; whole words only.
        lm_unit: whether the model's words are words, or token strings.
        tokens_per_frame: the most probable tokens that may extend a prefix in a frame; the vocabulary's size is exact.
    """

    beam: int = 16
    lm_weight: float = 0.5
    word_score: float = 0.0
    hotwords: Mapping[str, float] = field(default_factory=dict)
    lm_unit: Literal["word", "token"] = "word"
    tokens_per_frame: int = 40

    def __post_init__(self) -> None:
        for name, least in (("beam", 1), ("tokens_per_frame", 1), ("lm_weight", 0)):
            if not getattr(self, name) >= least:
                raise DecodeError(f"BeamOptions.{name} must be {least} or more, but is {getattr(self, name)}")
        for name in ("lm_weight", "word_score"):
            if not math.isfinite(getattr(self, name)):
                raise DecodeError(f"BeamOptions.{name} must be a finite number, but is {getattr(self, name)}")
        if self.lm_unit not in ("word", "token"):
            raise DecodeError(f"BeamOptions.lm_unit must be 'word' or 'token', but is {self.lm_unit!r}")


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One answer: ``score = am + lm_weight * lm + bonus``.

    Args:
        tokens: token ids, no blanks.
        text: the tokens spelled out.
        score: what hypotheses are ranked by.
        am: log-probability of the tokens, summed over the alignments that the search kept.
        lm: log-probability under the language model, unweighted; 0 without one.
        bonus: word scores and hotwords.
    """

    tokens: tuple[int, ...]
    text: str
    score: float
    am: float
    lm: float
    bonus: float


@final
class BeamDecoder:
    """Prefix beam search over one vocabulary.

    Args:
        tokens: the string of each id, as long as the vocabulary; the blank's string is not used.
        blank: id of the CTC blank.
        lm: None decodes by the acoustics (and hotwords) alone.
        word_boundary: where words begin, see `pieces`.
    Raises: DecodeError if the parts do not fit together.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        blank: int,
        lm: NGram | None = None,
        options: BeamOptions | None = None,
        *,
        word_boundary: WordBoundary = "prefix",
    ):
        if not 0 <= blank < len(tokens):
            raise DecodeError(f"blank must be a token id below {len(tokens)}, but is {blank}")
        # An empty string spells nothing, so that a blank called "<pad>" lends hotwords no letters.
        self.strings = tuple("" if token == blank else string for token, string in enumerate(tokens))
        check_boundary(self.strings, word_boundary)
        self.blank = blank
        self.lm = lm
        self.options = options or BeamOptions()
        self.word_boundary: WordBoundary = word_boundary
        # Where every token is a word the two units are one, and the token-level model is the quicker form.
        self._by_token = self.options.lm_unit == "token" or word_boundary == "every"
        parts = self._parts()
        self._fusion = Fusion(parts, len(tokens)) if parts else None

    def decode(self, logp_BTV: Tensor, len_B: Tensor) -> list[list[Hypothesis]]:
        """The best hypotheses of each utterance, best first, at most `BeamOptions.beam`.

        Args: logp_BTV: log-probabilities, any float type or device.  len_B: encoder frames.
        Raises: DecodeError if the shapes do not fit, or if a frame gives every token probability zero.
        """
        check_emissions(logp_BTV, len_B, self.blank)
        if logp_BTV.shape[2] != len(self.strings):
            raise DecodeError(
                f"logp_BTV has {logp_BTV.shape[2]} tokens, but the decoder was built for {len(self.strings)}"
            )
        logps = logp_BTV.detach().double().cpu().numpy()
        return [self._decode_one(logp_TV[:length]) for logp_TV, length in zip(logps, len_B.tolist(), strict=True)]

    def _parts(self) -> list[Part]:
        options, parts = self.options, list[Part]()
        if self.lm is not None:
            model = TokenModel if self._by_token else WordModel
            parts.append(model(self.lm, options.lm_weight, self.strings))
        if options.word_score != 0.0:
            parts.append(WordScore(options.word_score, self.strings, self.word_boundary))
        if options.hotwords:
            parts.append(Hotwords(options.hotwords, self.strings, self.word_boundary))
        return parts

    def _decode_one(self, logp_TV: Floats) -> list[Hypothesis]:
        tree = _Tree(self._fusion)
        beam = _Beam.start(tree, len(self.strings))
        for t, (logp_V, tried_C) in enumerate(zip(logp_TV, self._tried_TC(logp_TV), strict=True)):
            beam = beam.after(logp_V, tried_C, self.blank, self.options.beam, tree)
            if len(beam.node_W) == 0:
                raise DecodeError(f"frame {t} gives every token a probability of zero; the emissions are broken")
        am_W = np.logaddexp(beam.blank_W, beam.label_W)
        found = zip(beam.node_W.tolist(), am_W.tolist(), beam.lang_W.tolist(), strict=True)
        hypotheses = [self._hypothesis(tree, node, am, lang) for node, am, lang in found]
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)

    def _tried_TC(self, logp_TV: Floats) -> Ints:
        """The likeliest tokens of each frame, blank aside, in the order of their ids."""
        V = logp_TV.shape[1]
        labels = np.delete(np.arange(V), self.blank)
        count = min(self.options.tokens_per_frame, V - 1)
        if count == V - 1:
            return np.broadcast_to(labels, (len(logp_TV), count))
        best_TC = np.argpartition(-logp_TV[:, labels], count - 1, axis=1)[:, :count]
        return np.sort(labels[best_TC], axis=1)

    def _hypothesis(self, tree: _Tree, node: int, am: float, lang: float) -> Hypothesis:
        tokens = tree.prefix(node)
        text = spell(tokens, self.strings, self.word_boundary)
        if self._fusion is not None:
            lang += self._fusion.close(tree.state[node])
        lm = 0.0
        if self.lm is not None:
            lm = self.lm.sentence([self.strings[token] for token in tokens] if self._by_token else text.split())
        bonus = lang - self.options.lm_weight * lm
        return Hypothesis(tokens=tokens, text=text, score=am + lang, am=am, lm=lm, bonus=bonus)


@final
class _Tree:
    """Every prefix that was ever kept, once; node 0 is the empty one."""

    def __init__(self, fusion: Fusion | None):
        self._fusion = fusion
        self._child: dict[tuple[int, int], int] = {}
        self._parent = [-1]
        self._token = [-1]
        self.state: list[tuple[Hashable, ...]] = [fusion.start() if fusion else ()]

    def child(self, node: int, token: int) -> int:
        """One node for one prefix, even after it had been dropped: kept children still merge with it."""
        key = (node, token)
        if key not in self._child:
            self._child[key] = len(self._token)
            self._parent.append(node)
            self._token.append(token)
            self.state.append(self._fusion.step(self.state[node], token) if self._fusion else ())
        return self._child[key]

    def prefix(self, node: int) -> tuple[int, ...]:
        tokens = []
        while node != 0:
            tokens.append(self._token[node])
            node = self._parent[node]
        return tuple(reversed(tokens))

    def gains(self, nodes: list[int], V: int) -> Floats:
        """What each token would add to each of the prefixes: W V."""
        if self._fusion is None or not nodes:
            return np.zeros((len(nodes), V))
        return np.stack([self._fusion.row_V(self.state[node]) for node in nodes])


@final
@dataclass(frozen=True, kw_only=True)
class _Beam:
    """The prefixes after some frames.

    Args:
        node_W, parent_W, last_W: place in the tree, place of the prefix without its last token, the last token.
        blank_W, label_W: log-probability of the alignments that end in a blank, and in the last token.
        lang_W: what the text added so far.  gain_WV: what each further token would add.
    """

    node_W: Ints
    parent_W: Ints
    last_W: Ints
    blank_W: Floats
    label_W: Floats
    lang_W: Floats
    gain_WV: Floats

    @staticmethod
    def start(tree: _Tree, V: int) -> _Beam:
        """The empty prefix; it has no last token, and no alignment ends in one, so token 0 stands in."""
        zero_W = np.zeros(1, dtype=np.int64)
        return _Beam(
            node_W=zero_W,
            parent_W=zero_W - 1,
            last_W=zero_W,
            blank_W=np.zeros(1),
            label_W=np.full(1, -np.inf),
            lang_W=np.zeros(1),
            gain_WV=tree.gains([0], V),
        )

    def after(self, logp_V: Floats, tried_C: Ints, blank: int, width: int, tree: _Tree) -> _Beam:
        """The best `width` prefixes one frame later."""
        W, C = len(self.node_W), len(tried_C)
        am_W = np.logaddexp(self.blank_W, self.label_W)
        blank_W = am_W + logp_V[blank]
        label_W = self.label_W + logp_V[self.last_W]
        # A token after itself needs a blank between; without one it is the same label going on.
        repeats_WC = self.last_W[:, None] == tried_C
        grown_WC = np.where(repeats_WC, self.blank_W[:, None], am_W[:, None]) + logp_V[tried_C]
        self._merge(am_W, logp_V, tried_C, label_W, grown_WC)
        stay_W = np.logaddexp(blank_W, label_W) + self.lang_W
        lang_WC = self.lang_W[:, None] + self.gain_WV[:, tried_C]
        ranked = np.concatenate([stay_W, (grown_WC + lang_WC).ravel()])
        picked = np.sort(np.argpartition(-ranked, width - 1)[:width]) if len(ranked) > width else np.arange(len(ranked))
        picked = picked[ranked[picked] > -np.inf]
        cut = int(np.searchsorted(picked, W))
        kept, (w, c) = picked[:cut], np.divmod(picked[cut:] - W, C)
        pairs = zip(self.node_W[w].tolist(), tried_C[c].tolist(), strict=True)
        born = [tree.child(node, token) for node, token in pairs]
        return _Beam(
            node_W=np.concatenate([self.node_W[kept], np.array(born, dtype=np.int64)]),
            parent_W=np.concatenate([self.parent_W[kept], self.node_W[w]]),
            last_W=np.concatenate([self.last_W[kept], tried_C[c]]),
            blank_W=np.concatenate([blank_W[kept], np.full(len(born), -np.inf)]),
            label_W=np.concatenate([label_W[kept], grown_WC[w, c]]),
            lang_W=np.concatenate([self.lang_W[kept], lang_WC[w, c]]),
            gain_WV=np.concatenate([self.gain_WV[kept], tree.gains(born, len(logp_V))]),
        )

    def _merge(self, am_W: Floats, logp_V: Floats, tried_C: Ints, label_W: Floats, grown_WC: Floats) -> None:
        """Where a grown prefix is already in the beam, move its probability there (both arrays are changed)."""
        child, parent = np.nonzero(self.parent_W[:, None] == self.node_W)
        token = self.last_W[child]
        source = np.where(self.last_W[parent] == token, self.blank_W[parent], am_W[parent]) + logp_V[token]
        label_W[child] = np.logaddexp(label_W[child], source)
        pair, c = np.nonzero(token[:, None] == tried_C)
        grown_WC[parent[pair], c] = -np.inf
