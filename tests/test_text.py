"""What the cells of 02_text cannot show: bad input, laws over many texts, other people's readers, exact odds of the dropout, two processes and two threads."""
import json, os, random, subprocess, sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Library

from dalle_edu.core import rng, shipped
from dalle_edu.shapes import NOVEL, caption, sample_scenes, split_of
from dalle_edu.text import ALPHABET, END_OF_WORD, Tokenizer, _pieces, train_laptop

tok = Tokenizer.load('laptop')
wide = Tokenizer(tok.library, 256)
quick = settings(max_examples=50, deadline=None)
few = settings(max_examples=15, deadline=None)
words = st.text(ALPHABET, min_size=1, max_size=9)|st.sampled_from(['stars', 'background', 'outlined', 'circle', 'thr'])
texts = st.lists(words, max_size=12).map(' '.join)
long = 'a picture of a large outlined purple shape right of a small striped purple triangle on a sand background'

# rows

@quick
@given(st.lists(texts, max_size=5), st.sampled_from([0., .1, .7, 1.]))
def test_encode_and_decode_are_inverse_and_rows_are_well_formed(captions, dropout):
    ids = wide.encode(captions, dropout, rng(0))
    assert ids.shape==(len(captions), 256) and ids.dtype==torch.int64 and wide.decode(ids)==captions
    for row,c in zip(ids, captions):
        end = int(row.argmax())
        assert row[0]==wide.start and row[end]==wide.end==wide.V-1 and (row[end+1:]==wide.pad).all()
        inside = row[1:end]
        assert (inside>0).all() and (inside<wide.start).all()
        if not dropout: assert torch.equal(row, wide.encode([c])[0])               # whatever else is in the batch

def test_the_longest_caption_fits_and_one_token_more_does_not():
    row = lambda n: tok.encode([' '.join(['a']*n)])
    assert (row(30)!=tok.pad).all() and row(30)[0,-1]==tok.end
    with pytest.raises(ValueError, match="has 33 tokens with start and end, but the limit is 32: say it shorter$"): row(31)
    assert Tokenizer(tok.library, 3).encode(['star']).tolist()==[[tok.start, tok.library.token_to_id('star'+END_OF_WORD), tok.end]]

def test_every_caption_of_every_split_fits_and_comes_back():
    for split in ('train', 'val', 'novel'):
        said = [caption(s, i if i%2 else None) for i,s in enumerate(sample_scenes(1500, split=split, seed=11))]
        ids = tok.encode(said)
        assert tok.decode(ids)==said
        assert ((ids!=tok.pad).sum(1)==torch.tensor([len(c.split())+2 for c in said])).all()   # one number a word

def test_captions_may_be_any_iterable_and_none_at_all():
    same = [tok.encode(make(['a red star'])) for make in (list, tuple, iter, lambda x: (c for c in x))]
    assert all(torch.equal(ids, same[0]) for ids in same) and tok.encode([]).shape==(0, 32) and tok.decode(tok.encode([]))==[]
    assert tok.decode(tok.encode(['a red star']).tolist())==tok.decode(list(tok.encode(['a red star'])))==['a red star']

@pytest.mark.parametrize('captions,said', [
    (['A red star'],        "'A' in 'A red star' is outside the alphabet"),
    (['a red star.'],       r"'\.' in"),
    (['a red star', 'rød'], "'ø' in 'rød'"),
    (['two\nlines'],        'outside the alphabet'),
    (['a\tstar'],           'outside the alphabet'),
    (['3 stars'],           "'3' in"),
    (['</w>'],              "'<' in"),
    (['<pad>'],             "'<' in"),
    ([' a star'],           'one between words'),
    (['a star '],           'one between words'),
    (['a  star'],           'one between words'),
    ([' '],                 'one between words'),
    ([None],                'not NoneType'),
    ([['a star']],          'not list'),
    ([b'a star'],           'not bytes'),
    ('a star',              'in brackets'),
    (None,                  'in brackets'),
    (3,                     'in brackets'),
])
def test_bad_captions_are_refused_in_reading_and_in_learning(captions, said):
    for f in (tok.encode, Tokenizer.train):
        with pytest.raises(ValueError, match=said): f(captions)

@pytest.mark.parametrize('ids,said', [
    (torch.tensor([[1, 200]]), '200 is no token: numbers go from 0 to 199'),
    (torch.tensor([[-1]]),     '-1 is no token'),
    (torch.tensor([1, 2]),     'in brackets'),
    (torch.tensor(1),          'in brackets'),
    (torch.tensor([[1.]]),     'whole numbers'),
    ([[1.5]],                  'whole numbers'),
    ([1, 2],                   'in brackets'),
    (7,                        'in brackets'),
])
def test_bad_rows_are_refused(ids, said):
    with pytest.raises(ValueError, match=said): tok.decode(ids)

@pytest.mark.parametrize('L', [2, 0, -1, 7.5, '32', None])
def test_rows_that_hold_nothing_are_refused(L):
    with pytest.raises(ValueError, match='at least 3'): Tokenizer(tok.library, L)

# learning

def learn(counts, most):
    "The loop of the notebook, written once more: symbols as strings of numbers, ties to the lowest ones"
    split = {w: [*w[:-1], w[-1]+END_OF_WORD] for w in counts}
    number = {s:i for i,s in enumerate([*ALPHABET, *[a+END_OF_WORD for a in ALPHABET]])}
    merges = []
    while len(number)<most:
        pairs = Counter()
        for w,s in split.items():
            for p in zip(s, s[1:]): pairs[p] += counts[w]
        if not pairs: break
        top = min(pairs, key=lambda p: (-pairs[p], number[p[0]], number[p[1]]))
        merges.append(top); number.setdefault(''.join(top), len(number))
        for s in split.values():
            i = 0
            while i<len(s)-1:
                if (s[i],s[i+1])==top: s[i:i+2] = [''.join(top)]
                i += 1
    return merges

@few
@given(st.lists(st.lists(st.text('abc', min_size=1, max_size=6)|words, min_size=1, max_size=8).map(' '.join), min_size=1, max_size=8), st.integers(55, 90))
def test_learning_is_the_loop_of_the_notebook_ties_included(captions, V):
    got = Tokenizer.train(captions, V=V)
    assert got.merges==learn(Counter(w for c in captions for w in c.split()), V-3) and got.V<=V
    assert Tokenizer(got.library, 256).decode(Tokenizer(got.library, 256).encode(captions))==captions

def test_a_vocabulary_holds_the_alphabet_at_least():
    small = Tokenizer.train([long], V=55)
    assert small.V==55 and small.merges==[] and Tokenizer(small.library, 128).decode(Tokenizer(small.library, 128).encode([long]))==[long]
    with pytest.raises(ValueError, match='54 cannot hold the alphabet: at least 55'): Tokenizer.train([long], V=54)

def test_the_shipped_one_saw_training_scenes_alone():
    asked = []
    def spy(*args, **kw): asked.extend(sample_scenes(*args, **kw)); return asked
    got = train_laptop(spy, caption)
    assert len(asked)==20_000 and {split_of(s) for s in asked}=={'train'} and got.merges==tok.merges
    assert not any((t.shape,t.color) in NOVEL for s in asked for t in s.things)

CODE = """
import sys, torch
from dalle_edu.core import rng
from dalle_edu.shapes import sample_scenes, caption
from dalle_edu.text import Tokenizer, train_laptop
train_laptop(sample_scenes, caption).save(sys.argv[1])
torch.manual_seed(5)
print([Tokenizer.load(sys.argv[1]).encode(['a large striped star'], .5, g).tolist() for g in (rng(3), None)])
"""
def test_another_process_makes_the_same_file_and_the_same_spellings(tmp_path):
    env = {**os.environ, 'PYTHONHASHSEED': '4', 'RAYON_NUM_THREADS': '2', 'OMP_NUM_THREADS': '1'}
    said = subprocess.run([sys.executable, '-c', CODE, str(tmp_path)], capture_output=True, text=True, check=True, env=env).stdout
    assert (tmp_path/'tokenizer.json').read_bytes()==(shipped('tokenizer', 'laptop')/'tokenizer.json').read_bytes()
    torch.manual_seed(5)
    assert json.loads(said)==[tok.encode(['a large striped star'], .5, g).tolist() for g in (rng(3), None)]

# reading

@quick
@given(texts)
def test_pieces_are_those_of_the_library(text):
    rank = {m:i for i,m in enumerate(tok.merges)}
    assert [p for w in text.split() for p in _pieces(w, rank)]==tok.library.encode(text, add_special_tokens=False).tokens

def test_pieces_are_those_of_a_reader_by_other_people(tmp_path):
    "CTRL's tokenizer in transformers is byte-pair encoding in plain Python, with the same mark at the end of words"
    ctrl = pytest.importorskip('transformers.models.ctrl.tokenization_ctrl')
    (tmp_path/'vocab.json').write_text(json.dumps({**tok.library.get_vocab(), '<unk>': 198}))
    (tmp_path/'merges.txt').write_text('\n'.join(['#version: 0.2', *[' '.join(m) for m in tok.merges], '']))
    theirs = ctrl.CTRLTokenizer(str(tmp_path/'vocab.json'), str(tmp_path/'merges.txt'))
    rnd = random.Random(1)
    asks = [*long.split(), *(''.join(rnd.choices('aceilnorstud', k=rnd.randint(2, 10))) for _ in range(500))]
    for w in asks: assert theirs.bpe(w).split('@@ ')==[p.removesuffix(END_OF_WORD) for p in tok.library.encode(w).tokens], w

# dropout

def odds(symbols, rank, p):
    "Every spelling with its probability: the first survivor in order is merged, and if none survives the word stays (Provilkov et al. 2020, algorithm 1)"
    found = sorted((rank[q],i) for i,q in enumerate(zip(symbols, symbols[1:])) if q in rank)
    res = Counter({tuple(symbols): p**len(found)})
    for j,(_,i) in enumerate(found):
        for s,q in odds([*symbols[:i], symbols[i]+symbols[i+1], *symbols[i+2:]], rank, p).items(): res[s] += p**j*(1-p)*q
    return res

@pytest.mark.parametrize('word,p', [('striped', .1), ('striped', .5), ('moons', .3), ('background', .9)])
def test_spellings_come_as_often_as_they_should(word, p):
    rank,n = {m:i for i,m in enumerate(tok.merges)},6000
    want = odds([*word[:-1], word[-1]+END_OF_WORD], rank, p)
    assert abs(sum(want.values())-1)<1e-9 and len(want)>4
    name = {i:t for t,i in tok.library.get_vocab().items()}
    rows = tok.encode([word]*n, p, rng('odds', word))
    got = Counter(tuple(name[i] for i in row[1:row.index(tok.end)]) for row in rows.tolist())
    assert got.keys()<=want.keys()
    for s,q in want.items(): assert abs(got[s]-n*q) <= 5*(n*q*(1-q))**.5+1, (s, got[s], n*q)

def test_all_dropped_is_letters_and_none_dropped_is_plain():
    name = {i:t for t,i in tok.library.get_vocab().items()}
    row = wide.encode([long], 1.)[0]
    assert [name[i] for i in row.tolist()[1:int(row.argmax())]]==[p for w in long.split() for p in (*w[:-1], w[-1]+END_OF_WORD)]
    assert torch.equal(tok.encode([long], 0), tok.encode([long])) and torch.equal(tok.encode([long], 1e-12, rng(0)), tok.encode([long]))

def test_dropout_follows_the_seed_and_draws_nothing_when_off():
    draw = lambda seed: (torch.manual_seed(seed), wide.encode([long]*3, .3))[1]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])                                 # each row has its own
    assert torch.equal(wide.encode([long], .3, rng(1)), wide.encode([long], .3, rng(1)))
    torch.manual_seed(0); state,python = torch.get_rng_state(),random.getstate()
    tok.encode([long]); wide.encode([long], .3, rng(1))
    assert torch.equal(state, torch.get_rng_state()) and random.getstate()==python

def test_spellings_that_do_not_fit_are_drawn_again_and_never_cut():
    ids = tok.encode([long]*500, .1, rng(2))
    assert tok.decode(ids)==[long]*500
    tight = Tokenizer(tok.library, 21)                                             # not one token to spare
    assert torch.equal(tight.encode([long]*20, .02, rng(3)), tight.encode([long]*20))
    with pytest.raises(ValueError, match='the limit is 32: say it shorter or drop fewer merges'): tok.encode([long], 1.)

def test_nothing_is_left_on_after_an_exception():
    before,plain = tok.library.to_str(),tok.encode([long])
    for bad in ([long]*2, ['a red Star'], [long, None]):
        with pytest.raises(ValueError): tok.encode(bad, 1.)
        assert tok.library.to_str()==before and tok.library.model.dropout is None and torch.equal(tok.encode([long]), plain)

def test_dropout_in_one_thread_leaves_another_alone():
    plain = wide.encode([long]*4)
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda i: wide.encode([long]*4, .5 if i%2 else 0., rng(i)), range(40)))
    assert all(torch.equal(ids, plain) for ids in got[::2]) and not any(torch.equal(ids, plain) for ids in got[1::2])

@pytest.mark.parametrize('dropout', [-.1, 1.1, float('nan')])
def test_shares_that_are_none(dropout):
    with pytest.raises(ValueError, match='between 0 and 1'): tok.encode(['a star'], dropout)

# files

def test_saved_and_loaded_are_equal(tmp_path):
    mine = Tokenizer.train(['abab abc', 'bab cab'], V=60, L=9)
    mine.save(tmp_path/'new'/'folder')
    for place in (tmp_path/'new'/'folder', str(tmp_path/'new'/'folder')):
        again = Tokenizer.load(place)
        assert (again.L,again.V,again.start,again.end)==(9, mine.V, mine.V-2, mine.V-1) and again.library.get_vocab()==mine.library.get_vocab()
        assert torch.equal(again.encode(['abab', 'zzz']), mine.encode(['abab', 'zzz']))
        assert torch.equal(again.encode(['abab'], .5, rng(0)), mine.encode(['abab'], .5, rng(0)))
    assert [p.name for p in (tmp_path/'new'/'folder').iterdir()]==['tokenizer.json']

def test_a_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    tok.save(tmp_path); old = (tmp_path/'tokenizer.json').read_bytes()
    def half(self, text, **kw): self.write_bytes(text[:100].encode()); raise OSError('disk full')
    monkeypatch.setattr(Path, 'write_text', half)
    with pytest.raises(OSError): Tokenizer.train(['abab'], V=60).save(tmp_path)
    assert [p.read_bytes() for p in tmp_path.iterdir()]==[old]

@pytest.mark.parametrize('change', [lambda t: t[:len(t)//2], lambda t: '', lambda t: '[]', lambda t: '{}', lambda t: t.replace('"L": 32', '"L": "32"'),
                                    lambda t: t.replace('"L": 32,', ''), lambda t: t.replace('"type": "BPE"', '"type": "NONE"'), lambda t: json.dumps(json.loads(t)['library'])])
def test_damaged_files_are_refused(tmp_path, change):
    tok.save(tmp_path); file = tmp_path/'tokenizer.json'
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match='tokenizer.json is damaged or no tokenizer of this package'): Tokenizer.load(tmp_path)

def test_tokenizers_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ('huge', tmp_path, './none', 'a/b'):
        with pytest.raises(FileNotFoundError, match=r"give one of \['laptop'\] or a folder"): Tokenizer.load(place)
