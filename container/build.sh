#!/bin/bash
# Installs the engine into the Debian system that it runs in, as root: into an image, or into any root file system.
#
#   build.sh WHEEL [EXTRA...]      such as build.sh cellseg_batch-0.1.0-py3-none-any.whl onnx s3
#
# TORCH is what pip installs as torch, by default the CPU build of 2.13.0; for GPUs give torch==2.13.0 and the extras
# tensorrt and triton.  TORCH_INDEX is where it comes from.  Any PIP_... variable of pip counts too.
set -euo pipefail
wheel=$1
extras=$(IFS=,; echo "${*:2}")
torch=${TORCH:-torch==2.13.0}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends python3 python3-venv ca-certificates
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/cellseg-batch
pip() { /opt/cellseg-batch/bin/pip --no-cache-dir --quiet "$@"; }
pip install --index-url "$index" "$torch" --extra-index-url https://pypi.org/simple
pip install "$wheel${extras:+[$extras]}"
ln -sf /opt/cellseg-batch/bin/cellseg-batch /usr/local/bin/cellseg-batch

# Users have no home in it; data and cache are mounted here.
install --directory --mode 1777 /cache /data
id cellseg >/dev/null 2>&1 || useradd --no-create-home --uid 1000 cellseg
