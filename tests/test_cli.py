"The command line: what it refuses, what it imports, what it writes, and that a killed training goes on."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from PIL import Image

from dalle_edu import dvae, shapes
from dalle_edu.cli import NEEDS, draw, main, setup, sheet, train
from dalle_edu.clip import CLIP
from dalle_edu.prior import Prior
from dalle_edu.text import Tokenizer

env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
ask = 'a large solid red heart on a white background'
tiny = dict(device='cpu', steps=2, batch=2, progress=False, say=lambda line: None)

def python(code, cwd): return subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True)

def test_draw_writes_a_sheet_and_says_what_is_right(tmp_path, capsys):
    assert main(['draw', ask, 'two small blue stars', '--n', '2', '--out', str(tmp_path/'a.png'), '--device', 'cpu']) == 0
    said = capsys.readouterr().out
    assert said.count('DALL-E 2') == 2 and said.count('of 2 show what was asked') == 4 and str(tmp_path/'a.png') in said
    with Image.open(tmp_path/'a.png') as im: assert im.size[0] > 2*128 and im.size[1] > 4*128

def test_the_same_seed_draws_the_same_and_another_does_not(tmp_path):
    def drawn(seed): draw([ask], tmp_path/'s.png', system='dalle', n=2, seed=seed, device='cpu', say=lambda line: None); return (tmp_path/'s.png').read_bytes()
    assert drawn(0) == drawn(0) != drawn(1)

def test_drawing_imports_neither_accelerate_nor_matplotlib(tmp_path):
    code = f"import sys\nfrom dalle_edu.cli import main\nassert main(['draw', {ask!r}, '--n', '1', '--device', 'cpu']) == 0\nprint([m for m in ('accelerate', 'matplotlib') if m in sys.modules])"
    res = python(code, tmp_path)
    assert res.returncode == 0, res.stderr
    assert res.stdout.splitlines()[-1] == '[]' and (tmp_path/'drawing.png').is_file()

@pytest.mark.parametrize('words, message', [
    (['a small red dog'], "'dog'.*circle, square"), (['a red heart on a blue background'], 'white, gray, black, sand'), (['a red heart', '--n', '0'], 'n=0'),
    (['a red heart', '--guidance', '-1'], 'guidance'), (['a red heart', '--weights', 'nowhere/at/all'], 'nowhere'), (['a red heart', '--device', 'abacus'], 'abacus')])
def test_mistakes_are_one_line_and_no_file(tmp_path, capsys, words, message):
    out = tmp_path/'b.png'
    assert main(['draw', *words, '--out', str(out)]) == 2
    err = capsys.readouterr().err
    import re
    assert re.search(message, err) and err.startswith('dalle-edu: ') and err.count('\n') == 1 and not out.exists()

@pytest.mark.parametrize('words', [[], ['draw'], ['train'], ['train', 'dog'], ['sing']])
def test_unknown_words_are_refused_with_usage(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and 'usage: dalle-edu' in capsys.readouterr().err

@pytest.mark.parametrize('words', [['--help'], ['draw', '--help'], ['train', '--help']])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 0 and 'dalle-edu' in capsys.readouterr().out

def test_all_five_train_and_draw(tmp_path):
    done = train('all', out=tmp_path, **tiny)
    assert list(done) == list(NEEDS)
    for name in NEEDS:
        assert {p.name for p in (tmp_path/name).iterdir()} >= {'config.json', 'model.safetensors', 'README.md', 'training.json', 'checkpoint.pt'}
        stored = json.loads((tmp_path/name/'training.json').read_text())
        assert stored['command'].startswith(f'dalle-edu train {name} --size laptop --steps 2') and stored['seconds'] > 0
    assert draw([ask], tmp_path/'x.png', n=1, weights=tmp_path, device='cpu', say=lambda line: None).keys() == {'dalle', 'dalle2'}

def test_a_model_without_its_predecessor_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='dalle-edu train clip --size gpu'): train('decoder', size='gpu', out=tmp_path, **tiny)
    (tmp_path/'dvae').mkdir()                                             # another dVAE: the shipped prior speaks of other words
    with pytest.raises(FileNotFoundError, match='decoder needs prior.*dalle-edu train prior --size laptop'): train('decoder', out=tmp_path, **tiny)
    with pytest.raises(ValueError, match='no model'): train('gan', out=tmp_path, **tiny)
    with pytest.raises(ValueError, match='no size'): train('clip', size='huge', out=tmp_path, **tiny)

def test_the_decoder_begins_with_the_prior():
    others = dict(clip=CLIP.from_pretrained('laptop'), dvae=dvae.DVAE.from_pretrained('laptop'), prior=Prior.from_pretrained('laptop'))
    model = setup('decoder', 'laptop', Tokenizer.load('laptop'), others)[0]
    for a,b in ((model.image,others['prior'].image),(model.head.weight,others['prior'].image_head.weight)): torch.testing.assert_close(a, b, rtol=0, atol=0)

def test_a_training_may_begin_with_given_weights(tmp_path):
    "After one step at a rate of almost nothing it is where it began; the card says where that was"
    slow = {**tiny, 'steps': 1, 'lr': 1e-9, 'ema': None}
    train('dvae', out=tmp_path/'a', seed=1, **tiny)
    train('dvae', out=tmp_path/'b', init=tmp_path/'a'/'dvae', **slow)
    train('dvae', out=tmp_path/'c', **slow)
    a,b,c = (dvae.DVAE.from_pretrained(tmp_path/k/'dvae').state_dict() for k in 'abc')
    torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-3)
    assert any((a[k]-c[k]).abs().max() > 1e-2 for k in a)
    assert '--init' in (tmp_path/'b'/'dvae'/'README.md').read_text()

@pytest.mark.parametrize('words, message', [(['all', '--init', 'laptop'], 'one model'), (['dvae', '--init', 'nowhere/at/all'], 'nowhere')])
def test_weights_to_begin_with_are_looked_at(tmp_path, capsys, words, message):
    assert main(['train', *words, '--steps', '1', '--batch', '2', '--device', 'cpu', '--quiet', '--out', str(tmp_path)]) == 2
    assert message in capsys.readouterr().err

def test_weights_of_other_sizes_are_no_beginning(tmp_path):
    from dataclasses import replace
    dvae.DVAE(replace(dvae.DVAEConfig.size('laptop'), D=dvae.DVAEConfig.size('laptop').D//2)).save_pretrained(tmp_path/'small')
    with pytest.raises(ValueError, match='same sizes'): train('dvae', out=tmp_path/'x', init=tmp_path/'small', **tiny)

def test_a_killed_command_goes_on_to_the_same_weights(tmp_path):
    words = ['train', 'dvae', '--steps', '300', '--batch', '2', '--save-every', '5', '--device', 'cpu', '--quiet']
    def start(out): return subprocess.Popen([sys.executable, '-m', 'dalle_edu', *words, '--out', str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    killed = start(tmp_path/'killed')
    while not (tmp_path/'killed'/'dvae'/'checkpoint.pt').exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(.02)
    killed.send_signal(signal.SIGKILL); killed.wait(); killed.stderr.close()
    assert not (tmp_path/'killed'/'dvae'/'model.safetensors').exists()
    for out in ('killed', 'whole'):
        p = start(tmp_path/out)
        assert p.wait() == 0, p.stderr.read()
        p.stderr.close()
    a,b = [(tmp_path/out/'dvae'/'model.safetensors').read_bytes() for out in ('killed', 'whole')]
    assert a == b

def test_frames_of_a_sheet_tell_right_from_wrong(tmp_path):
    x = shapes.render(shapes.sample_scenes(2, seed=0))
    sheet([('a caption', None, None), ('who', x, [True, False])], tmp_path/'f.png', side=64)
    with Image.open(tmp_path/'f.png') as im: (r,g,b),(r2,g2,b2) = im.getpixel((88, 60)),im.getpixel((88+74, 60))
    assert g > r and r2 > g2
