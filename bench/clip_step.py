"""How long does one training step of CLIP take, ours and other people's?

    bash bench/peers.sh                                                  # once: the environment that has the peers
    bench/.venv/bin/python bench/clip_step.py                            # two threads; writes nbs/results/bench_clip_step.json
    bench/.venv/bin/python bench/clip_step.py --threads 1 --profile      # and what the time is made of

A whole step: gradients set to None, both towers, contrastive loss, backward, fused AdamW. Pictures of 32 px in patches of 4, width 128, 4 blocks in either
tower, 32 tokens of 512, embedding 128, 128 pairs. All contenders run in one process on one build of torch, in turn and in an order that rotates; a figure is
the median over the turns, by the clock on the wall and in processor time (the fairer one where the machine has other work). Captions fill the context (equal arithmetic), or are as long as those of the shapes world (`--captions shapes`): what follows
the last end token changes nothing, and our text tower leaves it out. Before the clock starts, each peer's weights are loaded into our CLIP, and the two losses must agree.
"""
import argparse, contextlib, importlib.machinery, json, os, statistics, subprocess, sys, time, types
from datetime import date
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch
from dalle_edu.clip import CLIP, CLIPConfig, clip_loss
from dalle_edu.published import clip_from_openai, clip_from_transformers

cfg = CLIPConfig(px=32, patch=4, D=128, depth=4, heads=2, V=512, L=32, text_D=128, text_depth=4, text_heads=2, E=128)

def without_torchvision():
    "Stand-ins for the few names of torchvision that open_clip imports and a training step never calls"
    def anything(_, name):
        if name.startswith('__'): raise AttributeError(name)
        return type('Kind', (type,), dict(__getattr__=anything))(name, (), {})
    class Empty(types.ModuleType): __getattr__ = anything
    for name in ('torchvision', 'torchvision.transforms', 'torchvision.transforms.functional', 'torchvision.ops', 'torchvision.ops.misc'):
        m = sys.modules[name] = Empty(name); m.__path__ = []; m.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        parent,_,last = name.rpartition('.')
        if parent: setattr(sys.modules[parent], last, m)

def transformers_clip():
    "Their model, and a function batch -> loss"
    from transformers import CLIPConfig as Config, CLIPModel
    tower = lambda D, depth, heads: dict(hidden_size=D, intermediate_size=4*D, num_hidden_layers=depth, num_attention_heads=heads, projection_dim=cfg.E, hidden_act='gelu')
    model = CLIPModel(Config(projection_dim=cfg.E, vision_config=dict(**tower(cfg.D, cfg.depth, cfg.heads), image_size=cfg.px, patch_size=cfg.patch),
        text_config=dict(**tower(cfg.text_D, cfg.text_depth, cfg.text_heads), vocab_size=cfg.V, max_position_embeddings=cfg.L, eos_token_id=cfg.V-1, bos_token_id=cfg.V-2, pad_token_id=0)))
    return model,lambda b: model(input_ids=b['ids'], pixel_values=b['pixels'], return_loss=True).loss,clip_from_transformers

def open_clip_clip():
    "Their model, and a function batch -> loss"
    without_torchvision()
    import open_clip
    model = open_clip.CLIP(cfg.E, open_clip.CLIPVisionCfg(layers=cfg.depth, width=cfg.D, head_width=cfg.D//cfg.heads, patch_size=cfg.patch, image_size=cfg.px),
        open_clip.CLIPTextCfg(context_length=cfg.L, vocab_size=cfg.V, width=cfg.text_D, heads=cfg.text_heads, layers=cfg.text_depth))
    loss = open_clip.ClipLoss()
    def step(b): return loss(*model(b['pixels'], b['ids']))
    return model,step,clip_from_openai

def data(captions, n=4, B=128):
    "`n` batches of pixels and ids"
    g,res = torch.Generator().manual_seed(0),[]
    for i in range(n):
        if captions == 'full':
            ids = torch.randint(1, cfg.V-2, (B, cfg.L), generator=g); ids[:,0],ids[:,-1] = cfg.V-2,cfg.V-1
            pixels = torch.rand(B, 3, cfg.px, cfg.px, generator=g)*2-1
        else:
            from dalle_edu import shapes
            from dalle_edu.text import Tokenizer
            tok = Tokenizer.load('laptop'); pixels,said = shapes.draw_batch(0, i, 0, B); ids = tok.encode(said)
            ids = torch.where(ids >= tok.start, ids+cfg.V-tok.V, ids)
        res.append(dict(pixels=pixels, ids=ids))
    return res

def contenders(batch):
    "name -> (model, batch -> loss); each peer must agree with our model of its weights"
    res = {}
    torch.manual_seed(0); ours = CLIP(cfg).train(); res['dalle_edu'] = ours,lambda b: clip_loss(ours, b, 0)[0]
    for name,make in (('transformers',transformers_clip), ('open_clip',open_clip_clip)):
        model,loss,read = make()
        with torch.no_grad(): theirs,mine = loss(batch).item(),clip_loss(read(model.state_dict(), act='gelu'), batch, 0)[0].item()
        assert abs(theirs-mine) < 1e-4, f'{name} computes {theirs}, our CLIP with its weights {mine}'
        print(f'{name}: loss {theirs:.5f}, our CLIP with its weights {mine:.5f}')
        res[name] = model.train(),loss
    return res

def stepper(model, loss, bf16):
    "A function batch -> seconds of a whole step, by the clock on the wall and of processor time"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(.9, .98), weight_decay=.1, fused=True)
    def step(batch):
        start,cpu = time.perf_counter(),time.process_time()
        opt.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16) if bf16 else contextlib.nullcontext(): l = loss(batch)
        l.backward(); opt.step(); l.item()
        return time.perf_counter()-start,time.process_time()-cpu
    return step

KINDS = dict(matmul=('mm', 'addmm', 'bmm', 'linear', 'matmul', 'mkldnn_linear', 'baddbmm', 'einsum'), attention=('scaled_dot_product', 'flash_attention'), convolution=('conv',), norm=('layer_norm',), activation=('gelu', 'sigmoid'),
    optimizer=('_fused_adamw', 'AdamW', 'Optimizer'), casts=('_to_copy', 'copy_', 'clone', 'contiguous'), embedding=('embedding', 'gather', 'scatter', 'index'))
def kind(op):
    "What an operator of the profile is about"
    name = op.split('::')[-1].lower()
    if name in KINDS['matmul']: return 'matmul'
    return next((k for k,parts in KINDS.items() if k != 'matmul' and any(p.lower() in op.lower() for p in parts)), 'the rest')

def profile(steps, batches, turns=3, n=1):
    "name -> milliseconds of a step by kind of operator, the contenders in turn"
    from torch.profiler import ProfilerActivity, profile as record
    res = {k: {} for k in steps}
    for turn in range(turns):
        for k,step in steps.items():
            with record(activities=[ProfilerActivity.CPU]) as prof:
                for i in range(n): step(batches[i])
            sums = {}
            for e in prof.key_averages(): sums[kind(e.key)] = sums.get(kind(e.key), 0)+e.self_cpu_time_total/1000/n
            for c,ms in sums.items(): res[k].setdefault(c, []).append(ms)
    return {k: {c: statistics.median(ms) for c,ms in v.items()} for k,v in res.items()}

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--captions', choices=['full', 'shapes', 'both'], default='both')
    ap.add_argument('--turns', type=int, default=15, help='turns of each contender')
    ap.add_argument('--steps', type=int, default=4, help='steps in a turn')
    ap.add_argument('--profile', action='store_true', help='and show what the time is made of')
    ap.add_argument('--note', help='kept in the result: what else the machine did')
    ap.add_argument('--name', default='bench_clip_step', help='write nbs/results/NAME.json')
    a = ap.parse_args()
    torch.set_num_threads(a.threads); start,load = time.time(),os.getloadavg()[0]
    kinds = ['full', 'shapes'] if a.captions == 'both' else [a.captions]
    pools = {k: data(k) for k in kinds}
    made = contenders(pools[kinds[0]][0])
    precisions = ['fp32']+['bf16']*torch.ops.mkldnn._is_mkldnn_bf16_supported()
    steps = {(name,p): stepper(*pair, p == 'bf16') for name,pair in made.items() for p in precisions}
    figures,parts = {},{}
    for captions,batches in pools.items():
        times = {k: [] for k in steps}
        for turn in range(a.turns+1):
            order = list(steps); order = order[turn%len(order):]+order[:turn%len(order)]
            for k in order:
                spent = [steps[k](batches[i%len(batches)]) for i in range(a.steps)]
                if turn: times[k].append([1000*statistics.median(s) for s in zip(*spent)])    # the first turn warms up
        ms,cpu = ({k: statistics.median(s[i] for s in t) for k,t in times.items()} for i in (0, 1))
        def quarter(t, q): return round(sorted(s[0] for s in t)[q*len(t)//4], 1)
        figures[captions] = {f'{n} {p}': dict(ms=round(ms[n,p], 1), low=quarter(t, 1), high=quarter(t, 3), cpu_ms=round(cpu[n,p], 1)) for (n,p),t in times.items()}
        longest = max(int(b['ids'].argmax(1).max())+1 for b in batches)
        pairs = [(p, q) for p,q in (('fp32', 'fp32'), ('bf16', 'bf16'), ('fp32', 'bf16')) if {p, q} <= set(precisions)]   # theirs, ours
        print(f'\ncaptions: {captions}, up to {longest} of {cfg.L} tokens · {a.threads} threads · load {os.getloadavg()[0]:.1f}\n{"ms of a step":14}'+''.join(f'{p:>9}{"cpu":>9}' for p in precisions)+'   times ours (by processor time):'+','.join(f' their {p} to our {q}' for p,q in pairs))
        for n in made: print(f'{n:14}'+''.join(f'{ms[n,p]:9.1f}{cpu[n,p]:9.1f}' for p in precisions)+'   '+'   '.join(f'{ms[n,p]/ms["dalle_edu",q]:.2f} ({cpu[n,p]/cpu["dalle_edu",q]:.2f})' for p,q in pairs))
        figures[captions]['ratios'] = {f'{n} {p} / ours {q}': dict(wall=round(ms[n,p]/ms['dalle_edu',q], 2), cpu=round(cpu[n,p]/cpu['dalle_edu',q], 2)) for n in made if n != 'dalle_edu' for p,q in pairs}
        if a.profile:
            parts[captions] = profile({f'{n} {p}': f for (n,p),f in steps.items()}, batches)
            rows = sorted({k for v in parts[captions].values() for k in v}, key=lambda k: -parts[captions]['dalle_edu fp32'].get(k, 0))
            print('\nms of a step\n'+f'{"":14}'+''.join(f'{k:>20}' for k in parts[captions]))
            for r in rows: print(f'{r:14}'+''.join(f'{v.get(r, 0):20.1f}' for v in parts[captions].values()))
            parts[captions] = {k: {r: round(x, 1) for r,x in v.items()} for k,v in parts[captions].items()}
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=root, capture_output=True, text=True).stdout.strip()
    import open_clip, transformers
    what = dict(command=' '.join(['python', 'bench/clip_step.py', *sys.argv[1:]]), commit=commit, date=str(date.today()), seconds=round(time.time()-start), threads=a.threads, load=round(load, 1), note=a.note,
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, open_clip=open_clip.__version__), figures=figures, **dict(profile=parts) if parts else {})
    path = root/'nbs'/'results'/f'{a.name}.json'; tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(what, indent=1)+'\n', encoding='utf-8'); tmp.replace(path)
    print(f'\nwritten: {path.relative_to(root)}')

if __name__ == '__main__': main()
