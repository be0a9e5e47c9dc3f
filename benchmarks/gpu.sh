#!/usr/bin/env bash
# Proves and measures the code for NVIDIA GPUs, in at most eight minutes and without a network:
#   bash benchmarks/gpu.sh [--out DIR] [--only PART...]    see python benchmarks/bench_gpu.py --help
# It needs torch with CUDA and Triton; parts that need more are left out, with the reason.  PYTHON names the
# interpreter; without it the first of python3 and python that has torch.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  for python in python3 python; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)" 2>/dev/null && break
  done
fi

"$python" - <<'CHECK' || exit 2
import importlib.util, sys
try:
    import torch
except ImportError:
    sys.exit("gpu.sh: expected torch, found none; pip install torch")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: expected a GPU that torch can use, found torch {torch.__version__} without one")
if importlib.util.find_spec("triton") is None:
    sys.exit("gpu.sh: expected triton, found none; pip install 'cellseg-batch[triton]'")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
CHECK

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! (cd "$work" && "$python" -c "import cellseg_batch.engine" 2>/dev/null); then
  "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index --target "$work/site" . || exit 2
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" benchmarks/bench_gpu.py --seconds $((480 - SECONDS)) "$@"
