#!/bin/sh
# Answer on a machine with a CUDA card everything that needs one, and write one Markdown page:
# docs/measurements/gpu-CARD.md. `sh benchmarks/gpu_check.sh --help` says what it measures.
# Before it: pip install .  (and "pip install vllm" for the part that compares engines)
set -eu
exec python "$(dirname "$0")/gpu_check.py" "$@"
