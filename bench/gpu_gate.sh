#!/usr/bin/env bash
# Builds in place, runs the GPU tests and the GPU benchmark: one command on a machine with a GPU.
#   bench/gpu_gate.sh [options of bench/gpu_gate.py]
# The result is one JSON file in bench/results. Nothing is downloaded: python3 must have torch with
# CUDA, triton, transformers, pytest with pytest-timeout, and setuptools.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
log=build/gpu_gate.log
# For the GPU at hand alone: code for all that a wheel serves would take minutes more.
arch=$(python3 -c 'import torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}" + "a" * (major >= 9))')
[ -z "$arch" ] || export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}"
# Editable, because that is what maps bert_fast._triton to its folder; the log is shown if it fails.
python3 -m pip install -v --no-build-isolation --no-deps -e . >"$log" 2>&1 \
  || { tail -n 80 "$log"; exit 1; }
! grep "without CUDA kernels" "$log" || exit 1
exec python3 -m bench.gpu_gate "$@"
