#!/bin/sh
# QLoRA of Mixtral-8x7B on one card of 40 GB and up, in a machine with 100 GiB of RAM. Further arguments are passed on:
# `--dry-run` shows every setting and the model's size, `--data FILE` trains on your own questions.
set -eu
exec "${PYTHON:-python}" "$(dirname "$0")/train.py" \
  --model mistralai/Mixtral-8x7B-Instruct-v0.1 \
  --output mixtral-adapter \
  --device cuda \
  --load-in-4bit \
  --dtype bfloat16 \
  --optim paged_adamw_8bit \
  --gradient-checkpointing \
  --batch-size 4 \
  --gradient-accumulation 4 \
  --max-length 512 \
  --learning-rate 2e-4 \
  --rank 16 --alpha 32 --dropout 0.05 \
  --max-steps 150 \
  "$@"
