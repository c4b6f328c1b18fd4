#!/usr/bin/env bash
# Trains an adapter on a model rounded to 4 bits (QLoRA), and merges it into the model.
#
#     examples/finetune.sh MODEL data.jsonl OUT [options of nybble finetune]
#
# data.jsonl has lines of {"messages": [...]}, {"prompt", "completion"} or {"text"}; an example is
# finetune/examples/captain.jsonl. The results are OUT/base, OUT/adapter and OUT/merged.
set -euo pipefail
model=$1 data=$2 out=$3
shift 3

nybble quantize "$model" "$out/base" --format nf4 --double-quant
nybble finetune "$out/base" "$data" "$out/adapter" "$@"
# To serve base and adapter without merging (requests then name the model "adapter"):
#     serve --model "$out/base" --lora-modules adapter="$out/adapter"
nybble merge "$out/base" "$out/adapter" "$out/merged" --keep-16-bits
nybble inspect "$out/merged"
