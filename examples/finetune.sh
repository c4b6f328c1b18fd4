#!/usr/bin/env bash
# Trains an adapter on a model rounded to 4 bits (QLoRA) and folds it back into the model.
#
#     examples/finetune.sh MODEL data.jsonl OUT [options of nybble finetune]
#
# data.jsonl has lines of {"messages": [...]}, {"prompt", "completion"} or {"text"}; for an example
# see finetune/examples/captain.jsonl. OUT gets base/, adapter/ and merged/.
set -euo pipefail
model=$1 data=$2 out=$3
shift 3

nybble quantize "$model" "$out/base" --format nf4 --double-quant
nybble finetune "$out/base" "$data" "$out/adapter" "$@"
# To serve base and adapter side by side instead, where "adapter" is a model's name in requests:
#     serve --model "$out/base" --lora-modules adapter="$out/adapter"
nybble merge "$out/base" "$out/adapter" "$out/merged" --keep-16-bits
nybble inspect "$out/merged"
