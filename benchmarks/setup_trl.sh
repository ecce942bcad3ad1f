#!/usr/bin/env bash
# Make .bench/trl: TRL in an environment of its own, with the versions of requirements/cpu.txt.  Quick when it exists.
#
#   PYTHON           interpreter to build the environment with (python3.11)
#   TORCH_INDEX_URL  PyTorch's index of CPU builds, where the plain name means the CUDA build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_version=2.13.0
folder=.bench/trl
stamp=$folder/.installed
wanted=$(cat requirements/cpu.txt benchmarks/requirements-trl.txt benchmarks/setup_trl.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

echo "setup_trl: building $folder (three to five minutes, 4 GB)"
[ -x "$folder/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$folder"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$folder/bin/python" -m pip install --quiet)
if ! "$folder/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
    if [ -z "${TORCH_INDEX_URL:-}" ] || ! "${pip[@]}" "torch==$torch_version" --index-url "$TORCH_INDEX_URL"; then
        "${pip[@]}" "torch==$torch_version"
    fi
fi
DS_BUILD_OPS=0 "${pip[@]}" --no-deps -r requirements/cpu.txt -r benchmarks/requirements-trl.txt
"$folder/bin/python" -c "import trl, datasets, vllm, torch; print('setup_trl: trl', trl.__version__, 'torch', torch.__version__)"
echo "$wanted" > "$stamp"
