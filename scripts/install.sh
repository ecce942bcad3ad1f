#!/usr/bin/env bash
# Make .venv with everything a CPU machine needs.  Quick when nothing has changed.
#
#   PYTHON           interpreter to build the environment with (3.11)
#   TORCH_INDEX_URL  PyTorch's index of CPU builds, for machines where the plain name means the CUDA build;
#                    PyTorch's installation page names it.  Without it the plain name is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_version=2.13.0
stamp=.venv/.installed
wanted=$(cat requirements/cpu.txt setup.cfg pyproject.toml scripts/install.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            python=$candidate; break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "install: no Python 3.11 found; install it, or name one with PYTHON=..." >&2; exit 1
fi

echo "install: building .venv (two to four minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=(.venv/bin/python -m pip install --quiet)

# torch first: everything after it is installed without resolving dependencies.
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
    if [ -z "${TORCH_INDEX_URL:-}" ] || ! "${pip[@]}" "torch==$torch_version" --index-url "$TORCH_INDEX_URL"; then
        "${pip[@]}" "torch==$torch_version"
    fi
fi
# DeepSpeed builds its kernels when they are first used, if ever.
DS_BUILD_OPS=0 "${pip[@]}" --no-deps -r requirements/cpu.txt
"${pip[@]}" --no-deps --no-build-isolation --editable .
echo "$wanted" > "$stamp"
