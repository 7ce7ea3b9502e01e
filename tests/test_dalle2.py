"DALL-E 2 as one object: what its notebook's cells cannot show"
import pytest, torch
from dataclasses import replace
from torch.testing import assert_close
from dalle_edu.dalle2 import DALLE2
from dalle_edu.decoder import Decoder

@pytest.fixture(scope='module')
def dalle2(): return DALLE2.from_pretrained('laptop', device='cpu')
asks = ['a large solid red heart on a white background', 'three small outlined green stars on a black background', 'a small striped blue square']
how = dict(steps=4, prior_steps=3)

def test_a_picture_is_a_function_of_seed_place_and_sample(dalle2):
    x = dalle2.generate(asks, n=2, **how)
    assert x.shape == (3,2,3,32,32) and x.abs().max() <= 1
    def alike(a, b): return ((a-b).abs().amax(-3) < .1).float().mean() > .95   # up to a code word on the edge
    assert alike(dalle2.generate(asks[:1], n=1, **how)[0,0], x[0,0]) and alike(dalle2.generate(asks[:2], n=2, **how)[1,1], x[1,1])
    for other in (dict(temperature=5.), dict(again=0)): assert not torch.equal(dalle2.generate(asks, n=2, **how, **other), x)
    assert not alike(x[0,0], x[0,1]) and not alike(dalle2.generate(asks, n=2, seed=1, **how)[0,0], x[0,0])

def test_painting_without_a_caption(dalle2):
    ids,keys = dalle2.tokenizer.encode(asks),[(0,i) for i in range(3)]
    with torch.no_grad(): z = dalle2.embed(ids, keys, steps=3)
    assert_close(z.norm(dim=1), torch.ones(3))
    a,b = (dalle2.paint(z, keys, said, steps=4) for said in (None, ids))
    assert a.shape == b.shape == (3,3,32,32) and not torch.equal(a, b) and torch.equal(a, dalle2.paint(z, keys, steps=4))

@pytest.mark.parametrize('kw,complaint', [(dict(px=64), 'px=64.*px=32'), (dict(n=0), 'n=0'), (dict(guidance=-1.), 'guidance -1'), (dict(steps=0), '0 sampling steps'), (dict(steps=65), '65 sampling steps'), (dict(temperature=0.), 'temperature 0.0'), (dict(again=-1), 'again=-1'), (dict(again=1.5), 'again=1.5')], ids=str)
def test_bad_arguments_are_named(dalle2, kw, complaint):
    with pytest.raises(ValueError, match=complaint): dalle2.generate(asks[:1], **{**how, **kw})

def test_models_of_another_alphabet_are_refused(dalle2):
    models = dict(dalle2.models, decoder=Decoder(replace(dalle2.decoder.cfg, K=100)))
    with pytest.raises(ValueError, match='models of different K'): DALLE2(dalle2.tokenizer, 'cpu', **models)
