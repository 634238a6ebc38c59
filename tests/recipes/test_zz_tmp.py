import itertools
from dataclasses import replace
from manyvoice.data.manifest import open_corpus
from manyvoice.recipes.personalize import Personalisation, personalize
from manyvoice.recipes.speakers import Split
from manyvoice.train.owners import Schedule
def test_x(base, speak, tmp_path):
    m = speak(tmp_path / "s.jsonl", {"ann": (16, ("mhl", "mhl")), "bob": (16, ("hlm", "hlm")), "mal": (13, ("mhl", "lmh")), "mel": (13, ("lll", "lmh"))})
    for scale, lr, rounds in ((1., 1e-2, 40), (1.,2e-2,40), (1., 3e-2, 40), (8., 2e-3, 40), (8., 5e-3, 40), (8.,3e-3,60)):
        w = Personalisation(settings={"rank": 4, "scale": scale}, split=Split(field="part"), masks=False, worse=1e9, schedule=Schedule(rounds=rounds, utterances=4, every=5, lr=lr))
        r = personalize(base, open_corpus(m), tmp_path / f"{scale}{lr}{rounds}", w)
        print(scale, lr, rounds)
        for o in r.outcomes: print("  ", o.speaker, o.kept, o.why[:30], o.round, [round(x,3) for x in o.choose_nats], o.before.wer, o.after.wer)
