"""What the cells of 06_clip_probes cannot show: laws over random numbers, second routes, other sizes and vocabularies, bad input."""
import random
import pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dalle_edu import probes, shapes
from dalle_edu.clip import CLIP, CLIPConfig, embed_images, embed_texts
from dalle_edu.probes import *

quick = settings(max_examples=25, deadline=None)
cfg = CLIPConfig(px=16, patch=8, D=16, depth=1, heads=2, V=60, L=24, text_D=24, text_depth=2, text_heads=3, E=10, act='quick_gelu')

def encode(captions):
    "Another tokenizer than the book's: one number a letter, start 58, end 59"
    ids = torch.zeros(len(captions), cfg.L, dtype=torch.long)
    for row,c in zip(ids, captions):
        own = [58,*(ord(ch)-96 if ch!=' ' else 30 for ch in c[:cfg.L-2]),59]
        row[:len(own)] = torch.tensor(own)
    return ids

def make(cls=CLIP):
    torch.manual_seed(0); m = cls(cfg)
    for p in m.parameters():
        if p.ndim>1: torch.nn.init.normal_(p, std=.3)
    return m.eval()

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def pictures(n, seed=0): return randn(n, 3, 16, 16, seed=seed).clamp(-1, 1)
seeds = st.integers(0, 10**6)

@quick
@given(st.integers(1, 500), st.data())
def test_wilson_interval_solves_its_equation(n, data):
    k = data.draw(st.integers(0, n))
    a = accuracy(torch.arange(n)<k)
    assert a['n']==n and 0<=a['low']<=a['share']+1e-6 and a['share']-1e-6<=a['high']<=1
    for v in (a['low'], a['high']): assert (k/n-v)**2==pytest.approx(1.96**2*v*(1-v)/n, abs=1e-5)

def test_zero_shot_by_loop_for_a_clip_of_other_sizes():
    m,x = make(),pictures(7)
    prompts = [['a cat','the cat'],'a dog',['one','two','three']]
    P,z = prototypes(m, encode, prompts, batch=2),features(m, x, batch=3)
    assert_close(z, embed_images(m, x)); assert_close(P.norm(dim=1), torch.ones(3))
    for p,cs in zip(P, prompts):
        t = sum(embed_texts(m, encode([c]))[0] for c in ([cs] if isinstance(cs, str) else cs))
        assert_close(p, t/t.norm(), atol=1e-5, rtol=1e-5)
    assert zero_shot(z, P).tolist()==[max(range(3), key=lambda k: float(u@P[k])) for u in z]
    assert_close(prototypes(m, encode, [['x','y'],['z']*3]), prototypes(m, encode, [['y','x'],'z']))
    own = [['a','b'],['b','c'],['c','a']]*2+[['b','a']]
    t = {c:embed_texts(m, encode([c]))[0] for c in 'abc'}
    assert choose(m, encode, z, own).tolist()==[int(u@t[b]>u@t[a]) for u,(a,b) in zip(z, own)]

def test_pair_cosines_are_each_with_each():
    m,x = make(),pictures(6).unflatten(0, (3,2))
    said = [['a','b'],['c','d'],['e','f']]
    c = pair_cosines(m, encode, x, said)
    for i in range(3):
        for j in range(2):
            for k in range(2): assert c[i,j,k].item()==pytest.approx(F.cosine_similarity(m.encode_image(x[i,j][None]), m.encode_text(encode([said[i][k]]))).item(), abs=1e-5)

@quick
@given(seeds, st.integers(2, 5), st.floats(.1, 10))
def test_linear_probe_is_where_newton_ends(seed, K, l2):
    z,y = randn(40, 4, seed=seed).double(),torch.arange(40)%K
    W = linear_probe(z, y, K, l2)
    z1 = torch.cat([z, torch.ones(40, 1)], 1).double()
    def loss(w):
        w = w.view(5, K)
        return F.cross_entropy(z1@w, y, reduction='sum')+l2/2*w[:-1].pow(2).sum()
    w = torch.zeros(5*K).double()
    for _ in range(12): # offsets may all move together: the pseudo-inverse leaves that alone
        g,H = torch.func.grad(loss)(w),torch.func.hessian(loss)(w)
        w = w-torch.linalg.pinv(H, rtol=1e-9)@g
    assert_close(W[:-1], w.view(5, K)[:-1], atol=1e-3, rtol=1e-3)
    assert (read(W, z)==(z1@w.view(5, K)).argmax(1)).float().mean() > .95

def test_few_shot_learns_what_is_separate_and_repeats_itself():
    y = torch.arange(90)%3
    z = 6*F.one_hot(y, 5).float()+randn(90, 5)
    r = few_shot(z, y, z, y, shots=(1,8), draws=2)
    assert list(r)==[1,8] and min(r[8]) > .97 and r==few_shot(z, y, z, y, shots=(1,8), draws=2)
    assert few_shot(z, y.roll(1), z, y, shots=(8,), draws=1)[8][0] < .1    # wrong labels are learned too
    with pytest.raises(ValueError, match='64 labels a class are asked for, but a class has 30'): few_shot(z, y, z, y)

@quick
@given(seeds)
def test_readable_is_least_squares(seed):
    z,y = randn(60, 5, seed=seed),torch.arange(60)%3
    A = torch.cat([z, torch.ones(60, 1)], 1)
    W = torch.linalg.lstsq(A, F.one_hot(y).float()).solution
    assert readable(z, y, z, y, l2=1e-6)==pytest.approx(((A@W).argmax(1)==y).float().mean().item(), abs=.02)
    v = z@randn(5, seed=seed+1)+2
    assert readable(z, v, z, v, l2=1e-4) > .999 and readable(z, v, z, v.flip(0), l2=1e-4) < .9

def test_principal_components_and_what_classes_explain():
    z = randn(500, 6)*torch.tensor([1,2,3,4,5,6.])
    mean,lam,U = spread(z)
    assert_close((z-mean)@U@U.T, z-mean, atol=1e-3, rtol=1e-3)
    assert_close(((z-mean)@U).var(0), lam, atol=1e-3, rtol=1e-3); assert (lam.diff()<=0).all()
    y = torch.arange(500)%4
    assert_close(explained(torch.stack([y.float(), randn(500)], 1), y)[0], torch.tensor(1.)); assert explained(randn(500, 1), y)[0] < .05
    s = switched(z, y, y//2)
    assert s.shape==(500,6*7)
    for k in range(4): assert_close(s[:,6*(k+1):6*(k+2)], z*(y==k)[:,None])

@quick
@given(seeds, st.integers(1, 30))
def test_winoground_by_loop(seed, n):
    c = randn(n, 2, 2, seed=seed)
    text = [float(a[0,0]>a[0,1] and a[1,1]>a[1,0]) for a in c]
    image = [float(a[0,0]>a[1,0] and a[1,1]>a[0,1]) for a in c]
    got = winoground(c)
    for k,v in dict(text=text, image=image, group=[t*i for t,i in zip(text, image)]).items(): assert got[k]['share']==pytest.approx(sum(v)/n)
    assert winoground(c.flip(1).flip(2))==got                               # which pair comes first does not count

@quick
@given(st.floats(-2, 1), st.floats(.2, 1.5), st.floats(-.2, .2))
def test_effective_robustness_is_the_distance_from_a_known_line(b, m, above):
    a = torch.tensor([.3,.5,.8,.9]).double()
    line = lambda v: torch.sigmoid(b+m*logit(v))
    at = torch.tensor([.6]).double()
    if not .01<line(a).min()<=line(a).max()<.99: return
    rho,b2,m2 = effective_robustness(a, line(a), at, line(at)+above)
    assert (rho.item(),b2,m2)==pytest.approx((above,b,m), abs=1e-6)

@quick
@given(seeds, st.sampled_from((16,32,48)))
def test_things_over_a_plain_background_are_a_rendering(seed, px):
    scenes = shapes.sample_scenes(3, seed=seed)
    for name,rgb in shapes.BACKGROUNDS.items():
        back = (torch.tensor(rgb)*2-1)[:,None,None].expand(3, px, px)
        assert_close(over(scenes, back), shapes.render([replace(s, background=name) for s in scenes], px), atol=1e-4, rtol=0)

def test_shifts_change_pictures_and_nothing_is_left_to_chance():
    scenes = shapes.sample_scenes(4, seed=3, kind='one')
    for px in (32,48):
        plain = shapes.render(scenes, px)
        assert_close(shifted(scenes, px=px), plain, rtol=0, atol=0)
        for s in SHIFTS:
            x = shifted(scenes, s, px)
            assert x.shape==plain.shape and ((x-plain).abs().flatten(1).amax(1)>.1).all() and x.abs().max()<=1+1e-5
            assert_close(x, shifted(scenes, s, px), rtol=0, atol=0)
    assert not set(probes.PALETTE.values()) & set(shapes.COLORS.values()) and set(probes.PALETTE)==set(shapes.COLORS)

def test_blur_keeps_the_light_and_is_as_wide_as_it_says():
    x = torch.zeros(1, 3, 33, 33); x[:,:,16,16] = 1
    y = blurred(x, 2/33)
    assert_close(y.sum((2,3)), torch.ones(1, 3)); assert_close(y, y.mT); assert_close(y, y.flip(2))
    at = torch.arange(33.)-16
    assert (y[0,0].sum(0)*at**2).sum().item()==pytest.approx(4, rel=.02)   # variance, pixels²

@pytest.mark.parametrize('split', ['train','val'])
def test_scenes_are_of_their_split_and_as_asked(split):
    for s in restyled(20, split, fill='striped', background='sand'):
        assert shapes.split_of(s)==split and s.things[0].fill=='striped' and s.background=='sand' and len(s.things)==1
    many = crowd(20, range(3, 8), split)
    assert [len(s.things) for s in many]==[3+i%5 for i in range(20)] and {shapes.split_of(s) for s in many}=={split}
    for what in ('shape','color','fill'):
        two = same_or_not(20, what, split)
        assert [getattr(s.things[0], what)==getattr(s.things[1], what) for s in two]==[True,False]*10 and {shapes.split_of(s) for s in two}=={split}
    shapes.render(many+two)

@pytest.mark.parametrize('what', ['shape','color','fill','left and right','above and below'])
def test_swapped_pairs_say_the_same_words(what):
    for a,b in swapped(20, what):
        assert shapes.split_of(a)=='val' and shapes.split_of(b)!='novel' and a.attributes!=b.attributes
        word = lambda s: sorted(w for t in s.things for w in t.attributes)
        assert word(a)==word(b) and shapes.shows(b, shapes.parse(shapes.caption(b))) and not shapes.shows(b, shapes.parse(shapes.caption(a)))
    if what in ('shape','color','fill'):
        for a,b in swapped(20, what, other=True): assert sum(x!=y for x,y in zip(a.things, b.things))==1 and getattr(b.things[0], what) not in [getattr(t, what) for t in a.things]

@quick
@given(st.sampled_from([(q,v) for q,vs in QUESTIONS.items() for v in vs]), st.one_of(st.none(), seeds))
def test_prompts_state_the_answer(qv, seed):
    q,v = qv
    scene = shapes.parse(ask(q, v, None if seed is None else random.Random(seed)))
    got = labels([scene])[q].item()
    assert QUESTIONS[q][got]==v

def test_labels_are_withheld_where_a_question_cannot_be_asked():
    red,blue = (shapes.Thing('circle', c, 'solid', 'small') for c in ('red','blue'))
    y = labels([shapes.Scene((red,blue), 'above', 'white'), shapes.Scene((red,)*3, None, 'black'), shapes.Scene((red,)*6, None, 'black')])
    assert {k:v.tolist() for k,v in y.items()}==dict(shape=[0,0,0], color=[-100,0,0], fill=[0,0,0], background=[0,2,2], count=[-100,2,-100], arrangement=[1,-100,-100])

def test_a_question_that_cannot_be_asked_teaches_nothing():
    m,x = Classifier(cfg, dict(shape=3, color=2)),pictures(4)
    loss,terms = classifier_loss(m, dict(pixels=x, shape=torch.tensor([0,1,-100,-100]), color=torch.full((4,), -100)), 0)
    loss.backward()
    assert terms['color']==0 and terms['shape'] > .1 and m.heads['color'].weight.grad.abs().max()==0
    alone = F.cross_entropy(m(x[:2])['shape'], torch.tensor([0,1]), reduction='sum')/4
    assert_close(terms['shape'], alone)

@quick
@given(st.lists(st.text('abcdefghijklmnopqrstuvwxyz', max_size=8), min_size=1, max_size=3), st.sampled_from((1,2)))
def test_labels_can_be_read_back(words, scale):
    x = pictures(len(words)).repeat(1, 1, 2*scale, 2*scale); before = x.clone()
    y = write(x, words)
    assert_close(x, before, rtol=0, atol=0); assert_close(y[:,:,:-7*scale], x[:,:,:-7*scale], rtol=0, atol=0)
    for w,pic in zip(words, y):
        dots = (pic[0,-7*scale::scale,::scale]<0)[1:6]                      # (5,32)
        left = (32*scale-(4*len(w)-1)*scale)//2//scale if w else 0
        shift = (32*scale-(4*len(w)-1)*scale)//2%scale if w else 0
        if shift: dots = (pic[0,-7*scale::scale,shift::scale]<0)[1:6]
        back = ''.join(next(c for c,rows in FONT.items() if rows==[''.join(str(int(d)) for d in row[left+4*k:left+4*k+3]) for row in dots]) for k in range(len(w)))
        assert back==w and dots.sum()==sum(r.count('1') for c in w for r in FONT[c])

class Reader(torch.nn.Module):
    "A model that sees the label and nothing else"
    def __init__(self, words): super().__init__(); self.known = [write(torch.zeros(1, 3, 32, 32), [w])[0,0,-7:] for w in words]
    def encode_image(self, x): return torch.stack([1.-(x[:,0,-7:]-k).abs().amax((1,2)).clamp(max=1) for k in self.known], 1)+1e-3

def test_who_reads_only_the_label_follows_it():
    words = ['cat','dog','owl']
    e = label_effect(Reader(words), torch.zeros(30, 3, 32, 32), torch.arange(30)%3, torch.eye(3), words)
    assert (e['right']['share'],e['wrong']['share'],e['follows']['share'])==(1,0,1) and e['bare']['share']==e['empty']['share']==pytest.approx(1/3)

@torch.no_grad()
def test_captioner_gives_probabilities_and_no_pad_counts():
    m = make(Captioner)
    h = m.tower(pictures(1))
    two = torch.cartesian_prod(torch.arange(60), torch.tensor([59]))        # every first token, the end next or at once
    ids = torch.zeros(60, cfg.L, dtype=torch.long); ids[:,0] = 58; ids[:,1:3] = two
    ids[59,2] = 0
    first = m.write(h.expand(60, -1), ids)
    end_next = []
    for i in range(59):                                                     # p(token) alone: what is left when the end is not asked for
        x = m.ln(m.body(torch.cat([m.first(h)[:,None], m.token(ids[i:i+1,1:2])], 1)+m.pos[:2]))
        end_next.append(m.out(x).log_softmax(-1)[0,1,59])
    assert ((first[:59]-torch.stack(end_next)).exp().sum()+first[59].exp()).item()==pytest.approx(1, abs=1e-4)
    rows = encode(['ab','abcdefgh'])
    assert_close(m.score(pictures(2), rows)[:,:1], m.score(pictures(2), rows[:1]), atol=1e-4, rtol=1e-4)

def test_a_bag_has_no_order_and_a_captioner_has():
    ids,x = encode(['ab cd','dc ba']),pictures(3)
    bag,cap = make(BagOfWords).score(x, ids),make(Captioner).score(x, ids)
    assert_close(bag[:,0], bag[:,1]); assert (cap[:,0]-cap[:,1]).abs().min() > 1e-3
    assert_close(tokens_of(encode(['aab']), 60)[0].nonzero()[:,0], torch.tensor([1,2]))

@pytest.mark.parametrize('cls,loss', [(Captioner,caption_loss),(BagOfWords,words_loss)])
def test_losses_are_means_over_the_batch(cls, loss):
    m,b = make(cls),dict(pixels=pictures(4), ids=encode(['a','bc','def','ghij']))
    each = [loss(m, {k:v[i:i+1] for k,v in b.items()}, 0)[0] for i in range(4)]
    assert_close(loss(m, b, 0)[0], sum(each)/4, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('call,said', [
    (lambda: accuracy(torch.zeros(0)>0), 'no answers'),
    (lambda: prototypes(make(), encode, ['a cat']), '1 classes'),
    (lambda: prototypes(make(), encode, ['a cat',[]]), 'at least 2 classes, each with 1 prompt'),
    (lambda: ask('colour', 'red'), "no answer 'red' to 'colour'"),
    (lambda: ask('shape', 'cube'), "'cube'"),
    (lambda: linear_probe(randn(3, 2), torch.tensor([0,1])), '3 features and 2 classes'),
    (lambda: linear_probe(randn(2, 2), torch.tensor([0,-100])), 'class -100'),
    (lambda: shifted(shapes.sample_scenes(1), 'fog'), "unknown shift 'fog'.*palette"),
    (lambda: restyled(1, shape='circle', color='orange'), 'no scene of .train. has the style'),
    (lambda: effective_robustness(torch.tensor([.5,.5]), torch.tensor([.4,.4]), torch.tensor([.5]), torch.tensor([.5])), '2 classifiers or more'),
    (lambda: winoground(torch.zeros(3, 2, 3)), r'\(3, 2, 3\)'),
    (lambda: swapped(1, 'size'), "cannot swap 'size'"),
    (lambda: swapped(1, 'left and right', other=True), 'another value'),
    (lambda: crowd(1, [1,12]), 'from 2 to 9'),
    (lambda: same_or_not(1, 'place'), "cannot compare 'place'"),
    (lambda: write(pictures(2), ['a']), '1 words for 2 pictures'),
    (lambda: write(pictures(1), ['Ab']), "'A' in 'Ab'"),
    (lambda: write(pictures(1), ['abcdefgh']), '31 pixels wide, the picture 16'),
], ids=lambda v: v.split('.')[0][:20].strip().replace(' ', '-').replace('\\','') if isinstance(v, str) else '')
def test_bad_input_is_refused(call, said):
    with pytest.raises(ValueError, match=said): call()
