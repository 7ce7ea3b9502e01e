"""Does it draw what was asked? First samples, no choosing, judged by shapes.score.

    python bench/score.py --system dalle            # writes nbs/results/score_dalle.json
    python bench/score.py --system dalle2 --n 200   # quicker, wider intervals
    python bench/score.py --system dvae             # the ceiling of DALL-E: true pictures, encoded and decoded

Columns: `one`, `two`, `count` (full captions of split val), `omissions` (val, captions that leave attributes out), `novel` (full captions
with a shape-colour pair that was never trained). Intervals are the wider of Wilson's and a bootstrap over captions. Work is done in pieces of 100 captions; a run that was stopped goes on with the next piece.
Columns of the same weights that an earlier run has measured, with another --n perhaps, stay in the result.
"""
import argparse, hashlib, inspect, json, random, subprocess, sys, time
from datetime import date
from pathlib import Path

import torch
from dalle_edu import shapes

root = Path(__file__).resolve().parent.parent
columns = dict(one=('val', 'one'), two=('val', 'two'), count=('val', 'count'), omissions=('val', None), novel=('novel', None))

def ask(column, n, seed):
    "`n` scenes of a column and their captions"
    split,kind = columns[column]
    scenes = shapes.sample_scenes(n, split=split, seed=f'score {column} {seed}', kind=kind)
    return scenes,[shapes.caption(s, seed=f'{seed} {i}' if column == 'omissions' else None) for i,s in enumerate(scenes)]

def load(system, folder, device):
    "A function (scenes, captions, seed, options) -> pictures (B,3,32,32)"
    if system == 'dvae':
        from dalle_edu.core import pick_device
        from dalle_edu.dvae import DVAE
        dvae = DVAE.from_pretrained(folder if folder == 'laptop' else f'{folder}/dvae').eval().to(pick_device(device))
        def draw(scenes, captions, seed, options): return dvae.decode(dvae.encode(shapes.render(scenes).to(next(dvae.parameters()).device)))
    else:
        from dalle_edu.dalle import DALLE
        from dalle_edu.dalle2 import DALLE2
        model = dict(dalle=DALLE, dalle2=DALLE2)[system].from_pretrained(folder, device=device)
        def draw(scenes, captions, seed, options): return model.generate(captions, seed=seed, **options)[:,0]
    return draw

def digest(folder):
    "A name for the weights, so that pieces of other weights are not counted"
    folder = root/'dalle_edu'/'weights'/'laptop' if folder == 'laptop' else Path(folder)
    h = hashlib.sha256()
    for p in sorted(folder.rglob('*.safetensors')): h.update(str(p.relative_to(folder)).encode() + p.read_bytes())
    return h.hexdigest()[:12]

def defaults(system):
    "What `generate` does where nothing is said, so that pieces drawn with other defaults are not counted"
    if system == 'dvae': return {}
    from dalle_edu.dalle import DALLE
    from dalle_edu.dalle2 import DALLE2
    given = inspect.signature(dict(dalle=DALLE, dalle2=DALLE2)[system].generate).parameters
    return {k: v.default for k,v in given.items() if isinstance(v.default, (int, float)) and k not in ('n', 'seed', 'px')}

def write(path, what):
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(what, indent=1)+'\n', encoding='utf-8')
    tmp.replace(path)

def pool(parts):
    "Counts of several pieces -> share and Wilson's 95 % interval for each kind"
    res = {}
    for kind in {k: None for p in parts for k in p}:
        k,n = (sum(p[kind][i] for p in parts if kind in p) for i in (0, 1))
        res[kind] = {a: round(b, 4) for a,b in shapes._wilson(k, n).items()}
    return res

def over_captions(captions, right, draws=2000):
    "95 % interval of a share when whole captions are drawn anew, since pictures of one caption stand or fall together"
    groups,rnd = {},random.Random(0)
    for c,ok in zip(captions, right): groups.setdefault(c, []).append(ok)
    groups = list(groups.values())
    shares = sorted(sum(map(sum, g))/sum(map(len, g)) for g in (rnd.choices(groups, k=len(groups)) for _ in range(draws)))
    return shares[draws//40],shares[-draws//40-1]

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--system', choices=['dalle', 'dalle2', 'dvae'], required=True)
    ap.add_argument('--columns', nargs='+', choices=list(columns), default=list(columns))
    ap.add_argument('--n', type=int, default=1000, help='captions in each column')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--guidance', type=float, help="default: the system's own")
    ap.add_argument('--rerank', type=int, default=1, help='draw so many, judge the one that CLIP likes best')
    ap.add_argument('--weights', default='laptop', help='laptop, or a folder with a subfolder for each model')
    ap.add_argument('--device')
    ap.add_argument('--piece', type=int, default=100, help='captions drawn at a time')
    ap.add_argument('--name', help='write nbs/results/score_NAME.json; default: the system')
    a = ap.parse_args()
    options = dict(rerank=a.rerank) | (dict(guidance=a.guidance) if a.guidance is not None else {})
    what = dict(version=2, system=a.system, n=a.n, seed=a.seed, weights=digest(a.weights), piece=a.piece, **{**defaults(a.system), **options})
    store = root/'.runs'/f'score_{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}.json'
    done = json.loads(store.read_text()) if store.exists() else {}
    draw = load(a.system, a.weights, a.device)
    for column in a.columns:
        scenes,captions = ask(column, a.n, a.seed)
        for at in range(0, a.n, a.piece):
            key = f'{column} {at}'
            if key in done: continue
            start,part = time.time(),slice(at, at+a.piece)
            pictures = draw(scenes[part], captions[part], a.seed*100_003+at, options)
            stated = [shapes.parse(c) for c in captions[part]]
            right = [shapes.shows(s, t) for s,t in zip(shapes.read_scenes(pictures.cpu()), stated)]
            kinds = {'all': right} | {k: [r for r,t in zip(right, stated) if t.kind == k] for k in dict.fromkeys(t.kind for t in stated)}
            done[key] = dict(seconds=time.time()-start, right=right, counts={k: [sum(v), len(v)] for k,v in kinds.items()})
            write(store, done)
            print(f"{key}: {done[key]['counts']['all']}", flush=True)
    figures = {c: pool([v['counts'] for k,v in done.items() if k.split()[0] == c]) for c in a.columns}
    for c,f in figures.items():                     # the wider of the two intervals
        low,high = over_captions(ask(c, a.n, a.seed)[1], [r for at in range(0, a.n, a.piece) for r in done[f'{c} {at}']['right']])
        f['all'] |= dict(low=round(min(low, f['all']['low']), 4), high=round(max(high, f['all']['high']), 4))
    out = root/'nbs'/'results'/f'score_{a.name or a.system}.json'
    before = json.loads(out.read_text()) if out.exists() else {}
    if all(before.get(k) == v for k,v in what.items() if k != 'n'): figures = {c: figures.get(c, before['figures'].get(c)) for c in columns if c in figures or c in before['figures']} # of the same weights: other columns stay
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=root, capture_output=True, text=True).stdout.strip()
    seconds = round(sum(v['seconds'] for k,v in done.items() if k.split()[0] in a.columns), 1)
    write(out, dict(command=' '.join(['python', 'bench/score.py', *sys.argv[1:]]), commit=commit,
          date=str(date.today()), seconds=seconds, **what, figures=figures))
    for c,f in figures.items(): print(f"{c:10} {100*f['all']['share']:5.1f} %   [{100*f['all']['low']:.1f}, {100*f['all']['high']:.1f}]   n={f['all']['n']}")

if __name__ == '__main__': main()
