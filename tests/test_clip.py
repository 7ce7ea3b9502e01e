"""What the cells of 05_clip cannot show: random shapes, other people's CLIP, bad input, saving, one batch against its neighbours."""
import json, math, os, subprocess, sys, textwrap
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from dalle_edu.clip import CLIP, CLIPConfig, batches, clip_loss, contrastive_loss, embed_images, embed_texts, gather, recipe
from dalle_edu.train import fit

tiny = CLIPConfig(px=8, patch=4, D=16, depth=2, heads=2, V=12, L=8, text_D=24, text_depth=2, text_heads=3, E=10)
quick = settings(max_examples=25, deadline=None)

def make(cfg=tiny, std=.2):
    "A CLIP whose every weight matters: at their initial size its branches are whispers"
    torch.manual_seed(0); m = CLIP(cfg)
    for n,p in m.named_parameters():
        if n!='logit_scale': nn.init.normal_(p, mean=float(('ln' in n or 'norm' in n) and 'weight' in n), std=std)
    return m.eval()

def pictures(n, seed=0): return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))*2-1
def rows(*lengths, seed=0):
    "Captions of so many tokens between start (10) and end (11), pads (0) behind"
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), 8, dtype=torch.long)
    for row,n in zip(ids, lengths): row[0],row[1:n+1],row[n+1] = 10,torch.randint(1, 10, (n,), generator=g),11
    return ids

def double_loop(u, v, logit_scale):
    s,B = math.exp(logit_scale),len(u)
    cos = [[(F.cosine_similarity(u[i].double(), v[j].double(), 0)).item() for j in range(B)] for i in range(B)]
    odds = lambda right, all_: -math.log(math.exp(s*right)/sum(math.exp(s*c) for c in all_))
    return sum(odds(cos[i][i], cos[i])+odds(cos[i][i], [row[i] for row in cos]) for i in range(B))/2/B

vectors = st.tuples(st.integers(2, 7), st.integers(1, 6), st.integers(0, 10**6), st.floats(-1, math.log(100)))
def draw(size):
    B,E,seed,s = size
    return *torch.randn(2, B, E, generator=torch.Generator().manual_seed(seed)),torch.tensor(s)

@quick
@given(vectors)
def test_loss_is_a_double_loop(size):
    u,v,s = draw(size)
    assert contrastive_loss(u, v, s).item()==pytest.approx(double_loop(u, v, s.item()), rel=1e-3, abs=1e-4)

@quick
@given(vectors, st.integers(2, 4))
def test_laws_of_the_loss(size, k):
    u,v,s = draw(size)
    loss,close = contrastive_loss(u, v, s),dict(rtol=1e-3, atol=1e-3)
    assert_close(contrastive_loss(v, u, s), loss, **close)                  # neither side is special
    order = torch.randperm(len(u)); assert_close(contrastive_loss(u[order], v[order], s), loss, **close)
    assert_close(contrastive_loss(u*torch.arange(1, len(u)+1)[:,None], v/3, s), loss, **close)   # length says nothing
    assert_close(contrastive_loss(u.repeat(k, 1), v.repeat(k, 1), s), loss+math.log(k), **close) # copies cannot be told apart
    assert_close(contrastive_loss(u[:1].expand_as(u), v, s.new_tensor(-90.)), torch.tensor(math.log(len(u))), **close)

def test_the_loss_is_computed_in_fp32_under_autocast():
    u,v,s = torch.randn(16, 8),torch.randn(16, 8),torch.tensor(math.log(100))
    want = contrastive_loss(u, v, s)
    with torch.autocast('cpu', torch.bfloat16): assert_close(contrastive_loss(u, v, s), want, rtol=0, atol=0)
    assert contrastive_loss(u.bfloat16(), v.bfloat16(), s).dtype==torch.float32

def theirs(m):
    "The same CLIP in `transformers`, by copying weights"
    from transformers import CLIPConfig as Config, CLIPModel
    c = m.cfg
    tower = lambda D, depth, heads: dict(hidden_size=D, intermediate_size=4*D, num_hidden_layers=depth, num_attention_heads=heads, projection_dim=c.E, hidden_act=c.act)
    t = CLIPModel(Config(projection_dim=c.E, vision_config=dict(**tower(c.D, c.depth, c.heads), image_size=c.px, patch_size=c.patch),
        text_config=dict(**tower(c.text_D, c.text_depth, c.text_heads), vocab_size=c.V, max_position_embeddings=c.L, eos_token_id=c.V-1, bos_token_id=c.V-2, pad_token_id=0))).eval()
    s = {'logit_scale':m.logit_scale, 'visual_projection.weight':m.image.proj.weight, 'text_projection.weight':m.text.proj.weight,
         'vision_model.embeddings.class_embedding':m.image.cls, 'vision_model.embeddings.patch_embedding.weight':m.image.patches.weight, 'vision_model.embeddings.position_embedding.weight':m.image.pos,
         'text_model.embeddings.token_embedding.weight':m.text.token.weight, 'text_model.embeddings.position_embedding.weight':m.text.pos}
    for p in ('weight','bias'):
        for name,mod in (('vision_model.pre_layrnorm',m.image.ln_pre),('vision_model.post_layernorm',m.image.ln_post),('text_model.final_layer_norm',m.text.ln_final)): s[f'{name}.{p}'] = getattr(mod, p)
        for side,body in (('vision_model',m.image.body),('text_model',m.text.body)):
            for i,b in enumerate(body.blocks):
                at = f'{side}.encoder.layers.{i}'
                for k,part in zip('qkv', getattr(b.attn.qkv, p).chunk(3)): s[f'{at}.self_attn.{k}_proj.{p}'] = part
                for name,mod in (('self_attn.out_proj',b.attn.out),('layer_norm1',b.norm1),('layer_norm2',b.norm2),('mlp.fc1',b.up),('mlp.fc2',b.down)): s[f'{at}.{name}.{p}'] = getattr(mod, p)
    missing,left = t.load_state_dict(s, strict=False)
    assert not left and all('position_ids' in k for k in missing)
    return t

def test_transformers_clip_and_its_loss():
    pytest.importorskip('transformers')
    from dataclasses import replace
    m = make(replace(tiny, act='quick_gelu'))
    x,ids = pictures(5),rows(1, 6, 3, 0, 4)
    with torch.no_grad():
        out = theirs(m)(input_ids=ids, pixel_values=x, return_loss=True)
        assert_close(embed_images(m, x), out.image_embeds, atol=1e-4, rtol=1e-3)
        assert_close(embed_texts(m, ids), out.text_embeds, atol=1e-4, rtol=1e-3)
        assert_close(clip_loss(m, dict(pixels=x, ids=ids), 0)[0], out.loss, atol=1e-4, rtol=1e-3)

@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_a_caption_depends_on_neither_pads_nor_neighbours(lengths, seed):
    m,ids = make(),rows(*lengths, seed=seed)
    want = m.encode_text(ids)
    assert want.shape==(len(lengths), 10)
    for i,n in enumerate(lengths):
        alone = ids[i:i+1]
        other = alone.clone(); other[0,n+2:] = torch.randint(0, 11, (6-n,))
        for row in (alone, alone[:,:n+2], other): assert_close(m.encode_text(row)[0], want[i], atol=1e-5, rtol=1e-4)

def test_a_caption_depends_on_each_of_its_tokens():
    m,ids = make(),rows(5)
    for at in range(6):
        other = ids.clone(); other[0,at] = ids[0,at]%9+1
        assert (m.encode_text(other)-m.encode_text(ids)).abs().max()>1e-3

def test_a_picture_does_not_depend_on_its_neighbours():
    m,x = make(),pictures(5)
    assert_close(m.encode_image(x[3:4]), m.encode_image(x)[3:4], atol=1e-5, rtol=1e-4)

def test_directions_have_length_one():
    m = make()
    for e in (embed_images(m, 3*pictures(4)), embed_texts(m, rows(1, 2, 3))): assert_close(e.norm(dim=1), torch.ones(len(e)))

def test_every_weight_is_reached():
    m = make().train()
    clip_loss(m, dict(pixels=pictures(4), ids=rows(1, 2, 3, 4)), 0)[0].backward()
    dead = [n for n,p in m.named_parameters() if p.grad is None or not p.grad.abs().max()>0]
    assert not dead

@pytest.mark.parametrize('scale, after', [(150., 100.), (100., 100.), (14., 14.), (.5, .5)])
def test_the_scale_is_kept_at_100_at_most(scale, after):
    m = make(); m.logit_scale.data.fill_(math.log(scale))
    loss,terms = clip_loss(m, dict(pixels=pictures(4), ids=rows(1, 2, 3, 4)), 0)
    assert m.logit_scale.exp().item()==pytest.approx(after, rel=1e-5) and terms['scale'].item()==pytest.approx(after, rel=1e-5)
    assert not terms['scale'].requires_grad
    loss.backward(); assert m.logit_scale.grad!=0                           # it can still come down

def test_training_makes_the_host_wait_for_no_value():
    "On `meta` tensors there are no values, and asking for one raises"
    with torch.device('meta'):
        m,x,ids = CLIP(tiny).train(),torch.zeros(4, 3, 8, 8),torch.zeros(4, 8, dtype=torch.long)
    u,v = m(x, ids)
    assert u.shape==v.shape==(4, 10)

def test_values_are_not_looked_at_in_training():
    m = make().train(); m.encode_image(pictures(2)*255); m.encode_text(rows(2)[:,:2])
    m.eval()
    with pytest.raises(ValueError): m.encode_image(pictures(2)*255)

@pytest.mark.parametrize('x, says', [
    (torch.zeros(2, 3, 16, 16), r'\(B,3,8,8\).*\(2, 3, 16, 16\).*resize'), (torch.zeros(2, 1, 8, 8), r'\(2, 1, 8, 8\)'), (torch.zeros(3, 8, 8), r'\(3, 8, 8\)'), (torch.zeros(0, 3, 8, 8), 'empty'),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 'uint8.*127.5'), (torch.full((1, 3, 8, 8), 255.), '255.*127.5'), (-torch.full((1, 3, 8, 8), 100.), '-100'),
    (torch.full((1, 3, 8, 8), math.nan), 'finite'), (torch.full((1, 3, 8, 8), math.inf), 'finite'), (-torch.full((1, 3, 8, 8), math.inf), 'finite')], ids=lambda v: f'{tuple(v.shape)} {v.dtype}' if isinstance(v, torch.Tensor) else v)
def test_bad_pictures_are_named(x, says):
    with pytest.raises(ValueError, match=says): make().encode_image(x)

def test_one_bad_pixel_is_enough():
    for bad in (math.nan, 200., -math.inf):
        x = pictures(3); x[1,2,3,4] = bad
        with pytest.raises(ValueError): make().encode_image(x)
    make().encode_image(pictures(3)*2.5)                                    # the published preprocessing goes beyond 1

@pytest.mark.parametrize('ids, says', [
    (torch.zeros(2, 9, dtype=torch.long), r'1 to 8.*\(2, 9\).*shorten'), (torch.zeros(2, 0, dtype=torch.long), r'\(2, 0\)'), (torch.zeros(8, dtype=torch.long), r'\(8,\)'), (torch.zeros(0, 8, dtype=torch.long), 'empty'),
    (rows(2).float(), 'float32'), (rows(2)+1, 'from 1 to 12.*0 to 11'), (rows(2)-1, 'from -1'), (torch.cat([rows(2), rows(2)])[:,:3], r'caption 0 has no end token \(11\)'),
    (torch.cat([rows(1), rows(5)])[:,:4], 'caption 1 has no end')], ids=lambda v: f'{tuple(v.shape)} {v.dtype}' if isinstance(v, torch.Tensor) else v)
def test_bad_captions_are_named(ids, says):
    with pytest.raises(ValueError, match=says): make().encode_text(ids)

@pytest.mark.parametrize('u, v, says', [((1,4), (1,4), 'batch of 1.*at least 2'), ((0,4), (0,4), 'batch of 0'), ((3,4), (2,4), r'\(3, 4\) pictures and \(2, 4\)'), ((3,4), (3,5), r'\(3, 5\)'), ((3,), (3,), r'\(B,E\)'), ((2,3,4), (2,3,4), r'\(B,E\)')], ids=lambda v: None if 'tensor' in str(v) else str(v))
def test_pairs_that_are_none_are_named(u, v, says):
    with pytest.raises(ValueError, match=says): contrastive_loss(torch.zeros(u), torch.zeros(v), torch.tensor(1.))

def test_fit_does_not_accumulate_it():
    data = lambda seed, step, rank, n: dict(pixels=pictures(n), ids=rows(*[2]*n))
    with pytest.raises(ValueError, match='compares'): fit(make(), clip_loss, data, steps=1, batch=2, lr=1e-3, accumulate=2, progress=False, device='cpu')

def test_it_learns_four_pairs():
    data = lambda seed, step, rank, n: dict(pixels=pictures(n), ids=rows(*range(1, n+1)))
    torch.manual_seed(0)
    history = fit(CLIP(tiny), clip_loss, data, steps=60, batch=4, lr=1e-2, warmup=5, log_every=1, progress=False, device='cpu', precision='fp32')
    assert history[0]['loss']>1 and history[-1]['loss']<.1

def test_batches_are_what_was_drawn_for_these_arguments():
    class Tok:
        def encode(self, captions): return torch.tensor([[len(c)] for c in captions])
    asked = []
    def source(seed, step, rank, n): asked.append((seed, step, rank, n)); return pictures(n, seed+step),['a'*(i+1) for i in range(n)]
    b = batches(source, Tok())(1, 2, 3, 4)
    assert asked==[(1, 2, 3, 4)] and b.keys()=={'pixels','ids'} and b['ids'].flatten().tolist()==[1, 2, 3, 4]
    assert_close(b['pixels'], pictures(4, 3))

@pytest.mark.parametrize('name', ['laptop', 'gpu'])
def test_sizes_and_recipes_are_plain(name):
    cfg = CLIPConfig.size(name)
    json.dumps(vars(cfg)); json.dumps(recipe(name)); assert {'steps','batch','lr'}<=recipe(name).keys()
    assert cfg.N==(cfg.px//cfg.patch)**2 and cfg.D%cfg.heads==cfg.text_D%cfg.text_heads==0

@pytest.mark.parametrize('f', [CLIPConfig.size, recipe])
def test_unknown_sizes_name_the_known_ones(f):
    with pytest.raises(ValueError, match="'huge'.*'gpu', 'laptop'"): f('huge')

def test_a_patch_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match='32 pixels.*patches of 5'): CLIPConfig(patch=5)

def test_saved_and_loaded(tmp_path):
    m,x,ids = make(),pictures(3),rows(1, 2, 3)
    m.save_pretrained(tmp_path/'clip')
    again = CLIP.from_pretrained(tmp_path/'clip')
    assert again.cfg==tiny and not again.training
    assert_close(again(x, ids), m(x, ids), rtol=0, atol=0)

def test_the_weights_that_come_along_tell_val_pairs_apart():
    from dalle_edu import shapes
    from dalle_edu.text import Tokenizer
    m,tok = CLIP.from_pretrained('laptop'),Tokenizer.load('laptop')
    assert m.cfg==CLIPConfig.size('laptop') and m.cfg.V==tok.V and m.cfg.L==tok.L
    scenes = list({s.attributes:s for s in shapes.sample_scenes(80, 'val', seed=3)}.values())[:64]
    with torch.no_grad(): cos = embed_images(m, shapes.render(scenes))@embed_texts(m, tok.encode([shapes.caption(s) for s in scenes])).T
    for c in (cos, cos.T): assert (c.argmax(1)==torch.arange(64)).float().mean()>.9

# two processes

def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    "Real processes, over gloo: one step by hand under DistributedDataParallel, and a short training by `fit`"
    script = tmp_path/'pair.py'
    script.write_text(textwrap.dedent('''
        import os, sys, torch
        from torch import distributed as dist
        from dalle_edu.clip import CLIP, CLIPConfig, clip_loss
        from dalle_edu.train import fit
        torch.set_num_threads(1)
        folder,rank,P = sys.argv[1],int(os.environ.get('RANK', 0)),int(os.environ.get('WORLD_SIZE', 1))
        cfg = CLIPConfig(px=8, patch=4, D=16, depth=1, heads=2, V=20, L=6, text_D=16, text_depth=1, text_heads=2, E=8)
        def model(): torch.manual_seed(0); return CLIP(cfg).train()
        def batch(seed, step, rank, n):
            g = torch.Generator().manual_seed(step); B = n*P
            ids = torch.cat([torch.randint(1, 19, (B, 4), generator=g),torch.full((B, 1), 19),torch.zeros(B, 1, dtype=torch.long)], 1)
            return {k: v[rank*n:rank*n+n] for k,v in dict(pixels=torch.rand(B, 3, 8, 8, generator=g)*2-1, ids=ids).items()}
        class Net(torch.nn.Module):
            def __init__(self): super().__init__(); self.model = model()
            def forward(self, batch): return clip_loss(self.model, batch, 0)[0]
        net = Net()
        if P>1: dist.init_process_group('gloo'); wrapped = torch.nn.parallel.DistributedDataParallel(net)
        loss = (wrapped if P>1 else net)(batch(0, 7, rank, 12//P)); loss.backward()
        trained = model(); history = fit(trained, clip_loss, batch, steps=4, batch=12//P, lr=1e-2, warmup=1, progress=False, device='cpu', precision='fp32', log_every=1)
        torch.save(dict(loss=loss.detach(), grads={k: p.grad for k,p in net.model.named_parameters()}, losses=[r['loss'] for r in history], weights=trained.state_dict()), f'{folder}/{P}.{rank}.pt')
        if P>1: dist.destroy_process_group()
    '''))
    for launch in ([], ['-m','torch.distributed.run','--standalone','--nproc_per_node','2']):
        subprocess.run([sys.executable, *launch, script, tmp_path], check=True, timeout=300, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join(sys.path)})
    one,*both = (torch.load(tmp_path/name) for name in ('1.0.pt','2.0.pt','2.1.pt'))
    for two in both:
        assert_close(two['loss'], one['loss'], atol=1e-5, rtol=0)
        assert_close(two['grads'], one['grads'], atol=1e-5, rtol=1e-5)
        assert_close(two['losses'], one['losses'], atol=1e-4, rtol=1e-4)
    assert_close(dict(both[0]['weights']), dict(both[1]['weights']), rtol=0, atol=0)
    assert one['losses'][0] != one['losses'][-1] and max(g.abs().max() for g in one['grads'].values()) > 1e-2

def test_one_process_gathers_nothing():
    x = torch.randn(3, 4)
    assert gather(x) is x
