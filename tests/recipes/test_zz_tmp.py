import time
def test_x(base, tones):
    from manyvoice.decode.evaluate import evaluate
    from manyvoice.decode.recogniser import Recogniser
    from manyvoice.data.manifest import open_corpus
    t=time.time()
    print(evaluate(Recogniser.load(base), open_corpus(tones)).as_dict(), time.time()-t)
