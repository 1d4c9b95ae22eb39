#!/usr/bin/env bash
# Builds in place, runs the GPU tests and the GPU benchmark: one command on a machine with a GPU.
#   bench/gpu_gate.sh [options of bench/gpu_gate.py]
# The result is one JSON file in bench/results.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
log=build/build_ext.log
# Editable: a build in place alone would not make kernels/_triton importable as bert_fast._triton.
python3 -m pip install --no-build-isolation --no-deps -e . >"$log" 2>&1 || { tail -n 60 "$log"; exit 1; }
exec python3 -m bench.gpu_gate "$@"
