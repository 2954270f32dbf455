#!/bin/sh
# Answer on a machine with a CUDA card everything that needs one, and write one Markdown report:
# docs/measurements/gpu-CARD.md. `sh benchmarks/gpu_check.sh --help` says what it measures.
set -eu
exec python "$(dirname "$0")/gpu_check.py" "$@"
