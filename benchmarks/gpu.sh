#!/usr/bin/env bash
# Proves and measures the code for NVIDIA GPUs, in under ten minutes and without a network:
#   bash benchmarks/gpu.sh            needs torch with CUDA and Triton; what else is missing is left out, with its reason
# Tests first, then figures, which go to benchmarks/results/<gpu>.json.  PYTHON names the interpreter; without it the
# first of python3 and python that has torch.
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
export CELLSEG_CACHE_DIR=$work/cache

failed=0
step() {  # step SECONDS NAME COMMAND...
  local limit=$1 name=$2 began=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@"
  local status=$?
  [ $status -eq 124 ] && echo "   stopped after $limit s"
  [ $status -eq 0 ] || failed=1
  echo "   exit $status after $((SECONDS - began)) s"
}

# Libraries that the project was not tested with may warn.
pytest=(-m pytest -q -n 0 -o filterwarnings=default)
for kernel in gather stitch blend; do
  step 30 "kernel $kernel: against its reference, then GB/s" "$python" -m "cellseg_batch.kernels.${kernel}_triton"
done
step 100 "tests of the GPU pipeline" "$python" "${pytest[@]}" -m gpu tests/engine/inference/test_gpu.py
if "$python" -c "import tensorrt, torch_tensorrt" 2>/dev/null; then
  step 90 "tests of TensorRT" "$python" "${pytest[@]}" -m tensorrt tests/engine/inference/backends/test_tensorrt.py
else
  echo "== tests of TensorRT: left out, as tensorrt or torch_tensorrt cannot be imported"
fi
step 300 "figures" "$python" benchmarks/bench_gpu.py --minutes 4
exit $failed
