#!/usr/bin/env bash
# A second environment, bench/.venv, for the projects that we measure ourselves against.
#
#     bash bench/peers.sh            # lends it the packages of the `python` on the PATH
#     bash bench/peers.sh PYTHON     # or of another one
#     bench/.venv/bin/python bench/clip_step.py
#
# open_clip asks for torchvision, which beside a CPU build of torch breaks whoever imports it. So open_clip is installed without its
# dependencies, here and not in the environment of the project, and the script that measures it puts an empty torchvision in its way.
# torch, numpy and transformers are the project's own, so that all run on the same build; an environment that is already there is made anew.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python}
lent=$("$python" -c 'import sysconfig; print("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))')
"$python" -c 'import torch, transformers' || { echo "peers.sh: $python has no torch or no transformers: activate the environment of the project (pip install -e '.[dev]') or name its python" >&2; exit 1; }
"$python" -m venv --clear "$here/.venv"
env=$here/.venv/bin/python
site=$("$env" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$lent" > "$site/lent.pth"
"$env" -m pip install --quiet --no-deps 'open_clip_torch==3.3.0' 'ftfy==6.3.1' 'wcwidth>=0.2.12' 'regex>=2024.4'
"$env" -c 'import importlib.metadata as m; print("bench/.venv:", *(f"{p} {m.version(p)}" for p in ("torch", "transformers", "open_clip_torch")), sep="  ")'
