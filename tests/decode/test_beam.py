import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyvoice.decode.beam import BeamDecoder, BeamOptions
from manyvoice.decode.greedy import greedy
from manyvoice.decode.lm import train_ngram
from manyvoice.decode.pieces import spell
from manyvoice.errors import DecodeError

STRINGS = ["▁a", "<blank>", "b", "▁ab"]
BLANK = 1
WORD_LM = train_ngram(["a ab abb", "ab ab", "abb a"], 2)
TOKEN_LM = train_ngram(["▁a b ▁ab", "▁ab ▁ab b"], 3)


def random_logp(T, V, seed, sharp=1.5):
    logits = torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (sharp * logits).log_softmax(-1)


def every_labelling(logp_TV, blank):
    """tokens -> log of the sum over all paths that collapse to them."""
    T, V = logp_TV.shape
    paths: dict[tuple[int, ...], list[float]] = {}
    for path in itertools.product(range(V), repeat=T):
        tokens = tuple(token for token, _ in itertools.groupby(path) if token != blank)
        paths.setdefault(tokens, []).append(sum(float(logp_TV[t, v]) for t, v in enumerate(path)))
    return {tokens: math.log(sum(map(math.exp, scores))) for tokens, scores in paths.items()}


def decode_one(decoder, logp_TV):
    (hypotheses,) = decoder.decode(logp_TV[None], torch.tensor([len(logp_TV)]))
    return hypotheses


def text_score(tokens, lm, options, boundary):
    """What the text should add, by the definition in the module's docstring."""
    text = spell(tokens, STRINGS, boundary)
    by_token = options.lm_unit == "token" or boundary == "every"
    words = [STRINGS[token] for token in tokens] if by_token else text.split()
    added = options.lm_weight * lm.sentence(words) if lm else 0.0
    added += options.word_score * len(text.split())
    return added + sum(weight * text.split().count(word) for word, weight in options.hotwords.items())


FUSIONS = {
    "acoustics alone": (None, BeamOptions(beam=999)),
    "word score": (None, BeamOptions(beam=999, word_score=0.8)),
    "word model": (WORD_LM, BeamOptions(beam=999, lm_weight=0.7)),
    "token model": (TOKEN_LM, BeamOptions(beam=999, lm_weight=0.7, lm_unit="token")),
    "hotword": (None, BeamOptions(beam=999, hotwords={"abb": 2.0})),
    "all": (WORD_LM, BeamOptions(beam=999, lm_weight=0.4, word_score=-0.3, hotwords={"abb": 2.0, "ab": 0.5})),
}


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("seed", range(2))
def test_a_full_beam_is_the_sum_over_all_alignments(name, seed):
    lm, options = FUSIONS[name]
    logp_TV = random_logp(4, 4, seed)
    expected = {
        tokens: (am, am + text_score(tokens, lm, options, "prefix"))
        for tokens, am in every_labelling(logp_TV, BLANK).items()
    }
    found = decode_one(BeamDecoder(STRINGS, BLANK, lm, options), logp_TV)
    assert {hypothesis.tokens for hypothesis in found} == set(expected), "each prefix once"
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for h in found:
        am, score = expected[h.tokens]
        assert h.am == pytest.approx(am, abs=1e-9)
        assert h.score == pytest.approx(score, abs=1e-9)
        assert h.score == pytest.approx(h.am + options.lm_weight * h.lm + h.bonus, abs=1e-9)
        assert h.text == spell(h.tokens, STRINGS, "prefix")


def test_every_token_a_word():
    strings = ["a", "", "b", "c"]
    lm, options = train_ngram(["a b", "b c a"], 2), BeamOptions(beam=999, word_score=0.5)
    logp_TV = random_logp(4, 4, 3)
    found = decode_one(BeamDecoder(strings, 1, lm, options, word_boundary="every"), logp_TV)
    for h in found:
        assert h.text.split() == [strings[token] for token in h.tokens]
        assert h.lm == pytest.approx(lm.sentence(h.text.split()))
        assert h.score == pytest.approx(h.am + 0.5 * h.lm + 0.5 * len(h.tokens), abs=1e-9)
    expected = every_labelling(logp_TV, 1)
    assert {h.tokens: h.am for h in found} == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), beam=st.integers(1, 6))
def test_no_beam_beats_the_full_one(seed, beam):
    logp_TV = random_logp(6, 4, seed)
    full = decode_one(BeamDecoder(STRINGS, BLANK, WORD_LM, BeamOptions(beam=9999)), logp_TV)
    exact = {h.tokens: h.score for h in full}
    narrow = decode_one(BeamDecoder(STRINGS, BLANK, WORD_LM, BeamOptions(beam=beam)), logp_TV)
    assert len({h.tokens for h in narrow}) == len(narrow) <= beam
    for h in narrow:
        assert h.score <= exact[h.tokens] + 1e-9, "dropped alignments can only be missing"
    assert narrow[0].score <= full[0].score + 1e-9


def test_a_prefix_that_was_dropped_and_found_again_is_one_prefix():
    """After two frames the beam holds "" and "a b", after three "a" again, whose child "a b" is still there."""
    strings, lm = ["", "a", "b"], train_ngram(["a b"] * 20, 2)
    logp_TV = torch.tensor(
        [[0.5, 0.5, 0.0], [0.3, 0.0, 0.7], [0.4, 0.6, 0.0], [0.1, 0.0, 0.9]], dtype=torch.float64
    ).log()
    tight = BeamDecoder(strings, 0, lm, BeamOptions(beam=2, lm_weight=1.0), word_boundary="every")
    for frames, texts in ((2, {"", "a b"}), (3, {"a", "a b"})):
        # What closing adds changes the order only.
        assert {h.text for h in decode_one(tight, logp_TV[:frames])} == texts
    found = decode_one(tight, logp_TV)
    assert len({h.tokens for h in found}) == len(found) == 2
    assert found[0].text == "a b"
    assert math.exp(found[0].am) == pytest.approx(0.5 * 0.7 * 0.4 * 0.1 + 0.5 * 0.3 * 0.6 * 0.9, abs=1e-12)


def test_wider_beams_find_better_scores_on_the_whole():
    decoders = [BeamDecoder(STRINGS, BLANK, WORD_LM, BeamOptions(beam=beam)) for beam in (1, 2, 4, 8, 64)]
    logps = [random_logp(8, 4, seed) for seed in range(20)]
    means = [sum(decode_one(decoder, logp_TV)[0].score for logp_TV in logps) / 20 for decoder in decoders]
    assert means == sorted(means)
    assert means[-1] > means[0]


def test_sure_emissions_decode_as_greedy_does():
    path = [1, 0, 0, 1, 0, 2, 2, 1, 3]
    logp_TV = torch.full((9, 4), -20.0)
    logp_TV[range(9), path] = -1e-6
    for beam in (1, 16):
        best = decode_one(BeamDecoder(STRINGS, BLANK, options=BeamOptions(beam=beam)), logp_TV)[0]
        assert [list(best.tokens)] == greedy(logp_TV[None], torch.tensor([9]), BLANK) == [[0, 0, 2, 3]]
        assert best.text == "a ab ab"


def test_a_batch_is_its_utterances_and_padding_is_not_heard():
    logp_BTV = torch.stack([random_logp(6, 4, seed) for seed in range(3)])
    len_B = torch.tensor([6, 3, 0])
    decoder = BeamDecoder(STRINGS, BLANK, WORD_LM)
    together = decoder.decode(logp_BTV, len_B)
    logp_BTV[1, 3:] = -torch.inf
    assert decoder.decode(logp_BTV, len_B) == together
    for b in range(3):
        assert together[b] == decode_one(decoder, logp_BTV[b, : len_B[b]])
    assert [h.tokens for h in together[2]] == [()]


def test_a_hotword_flips_an_ambiguous_utterance():
    strings = ["", "▁write", "▁right", "▁now"]
    logp_TV = torch.tensor([[0.02, 0.43, 0.53, 0.02], [0.9, 0.04, 0.03, 0.03], [0.02, 0.02, 0.02, 0.94]]).log()
    lm = train_ngram(["right now", "right", "write"], 2)
    for model in (None, lm):
        plain = decode_one(BeamDecoder(strings, 0, model), logp_TV)[0]
        hot = decode_one(BeamDecoder(strings, 0, model, BeamOptions(hotwords={"write": 3.0})), logp_TV)[0]
        phrase = decode_one(BeamDecoder(strings, 0, model, BeamOptions(hotwords={"write now": 3.0})), logp_TV)[0]
        other = decode_one(BeamDecoder(strings, 0, model, BeamOptions(hotwords={"now write": 3.0})), logp_TV)[0]
        assert (plain.text, hot.text, phrase.text, other.text) == ("right now", "write now", "write now", "right now")
        assert hot.bonus == pytest.approx(3.0)
        assert other.score == pytest.approx(plain.score), "a phrase that is not there gives and takes nothing"


def test_a_loan_keeps_a_hotword_in_a_narrow_beam():
    """Its beginning is so unlikely that only the loan keeps it until the end, where it wins."""
    strings = ["", "▁x", "▁k", "a", "i"]
    logp_TV = torch.tensor(
        [[0.01, 0.90, 0.07, 0.01, 0.01], [0.01, 0.01, 0.01, 0.96, 0.01], [0.01, 0.01, 0.01, 0.01, 0.96]]
    ).log()
    narrow = BeamOptions(beam=1, hotwords={"kai": 12.0})
    assert decode_one(BeamDecoder(strings, 0, None, narrow), logp_TV)[0].text == "kai"
    assert decode_one(BeamDecoder(strings, 0, None, BeamOptions(beam=1)), logp_TV)[0].text == "xai"


def test_a_language_model_chooses_between_equals():
    strings = ["", "▁see", "▁sea", "▁the"]
    logp_TV = torch.tensor([[0.02, 0.02, 0.02, 0.94], [0.90, 0.03, 0.03, 0.04], [0.02, 0.48, 0.48, 0.02]]).log()
    for text, answer in (("the sea", "the sea"), ("the see", "the see")):
        lm = train_ngram([text, "see", "sea"], 2)
        assert decode_one(BeamDecoder(strings, 0, lm), logp_TV)[0].text == answer


def test_an_unseen_word_costs_what_unk_costs():
    lm = train_ngram(["ab"], 2)
    logp_TV = torch.full((1, 4), -30.0)
    logp_TV[0, 0] = 0.0
    best = decode_one(BeamDecoder(STRINGS, BLANK, lm), logp_TV)[0]
    assert best.text == "a"
    assert best.lm == pytest.approx(lm.score(lm.start(), "<unk>") + lm.score((), "</s>"))


def test_fewer_tokens_in_a_frame_change_nothing_when_the_rest_is_impossible():
    logp_TV = random_logp(6, 4, 5)
    logp_TV[:, 2] = -torch.inf
    logp_TV[:, 3] = -50.0
    tight = decode_one(BeamDecoder(STRINGS, BLANK, WORD_LM, BeamOptions(tokens_per_frame=1)), logp_TV)
    loose = decode_one(BeamDecoder(STRINGS, BLANK, WORD_LM, BeamOptions()), logp_TV)
    assert tight[0].tokens == loose[0].tokens
    assert tight[0].score == pytest.approx(loose[0].score, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "BeamOptions.beam must be 1 or more, but is 0"),
        ({"tokens_per_frame": 0}, "BeamOptions.tokens_per_frame must be 1 or more"),
        ({"lm_weight": -1.0}, "BeamOptions.lm_weight must be 0 or more, but is -1"),
        ({"lm_weight": math.inf}, "BeamOptions.lm_weight must be a finite number"),
        ({"word_score": math.nan}, "BeamOptions.word_score must be a finite number"),
        ({"lm_unit": "letter"}, "BeamOptions.lm_unit must be 'word' or 'token', but is 'letter'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(DecodeError, match=message):
        BeamOptions(**options)


def test_parts_that_do_not_fit():
    with pytest.raises(DecodeError, match="blank must be a token id below 4, but is 4"):
        BeamDecoder(STRINGS, 4)
    with pytest.raises(DecodeError, match="no token spells 'k'"):
        BeamDecoder(STRINGS, BLANK, options=BeamOptions(hotwords={"ak": 1.0}))
    with pytest.raises(DecodeError, match="logp_BTV has 3 tokens, but the decoder was built for 4"):
        decode_one(BeamDecoder(STRINGS, BLANK), torch.zeros(2, 3))
    with pytest.raises(DecodeError, match="frame 1 gives every token a probability of zero"):
        decode_one(BeamDecoder(STRINGS, BLANK), torch.tensor([[-1.0] * 4, [-torch.inf] * 4]))
