"A wheel, installed where no source is, draws."
import os, shutil, subprocess, sys, sysconfig
from pathlib import Path

root = Path(__file__).resolve().parent.parent
env = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}

def sh(*cmd, cwd):
    res = subprocess.run([str(c) for c in cmd], cwd=cwd, env=env, capture_output=True, text=True)
    assert not res.returncode, res.stdout[-3000:] + res.stderr[-3000:]
    return res.stdout

def test_the_wheel_draws_in_a_fresh_environment(tmp_path):
    "Its dependencies are lent by this environment, so that no registry is needed; this package is not: a path in a .pth file brings no editable installs along."
    source = shutil.copytree(root, tmp_path/'source', ignore=shutil.ignore_patterns('.git', '.venv', '.runs', 'build', '*.egg-info', '__pycache__', '_docs'))
    sh(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, '.', cwd=source)
    sh(sys.executable, '-m', 'venv', '--without-pip', tmp_path/'fresh', cwd=tmp_path)
    python = tmp_path/'fresh'/'bin'/'python'
    place = Path(sh(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=tmp_path).strip())
    sh(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', next(tmp_path.glob('*.whl')), cwd=tmp_path)
    (place/'lent.pth').write_text('\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}))
    shutil.rmtree(source)
    where = sh(python, '-c', 'import dalle_edu; print(dalle_edu.__file__)', cwd=tmp_path).strip()
    assert Path(where).is_relative_to(place)
    said = sh(tmp_path/'fresh'/'bin'/'dalle-edu', 'draw', 'a small red circle above a large blue square', '--n', '2', '--device', 'cpu', cwd=tmp_path)
    assert said.count('of 2 show what was asked') == 2 and (tmp_path/'drawing.png').stat().st_size > 1000
