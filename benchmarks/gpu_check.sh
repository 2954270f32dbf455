#!/bin/sh
# Check on a machine with a CUDA device what needs one: the tests marked gpu, then a short
# profile of the default model. Without a device the tests are skipped and say so.
#   sh benchmarks/gpu_check.sh [FOLDER_FOR_THE_PROFILE]
set -eu
folder=$(realpath -m "${1:-profile-gpu}")
cd "$(dirname "$0")/.."
python -m pytest -m gpu -ra tests
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    lm-eval-pruned profile --device cuda --dtype bfloat16 --ratios 2.4 1.6 --multiple_of 1 64 \
        --batch_sizes 1 8 --apply_chat_template --output_path "$folder"
else
    echo "No CUDA device here: nothing was profiled."
fi
