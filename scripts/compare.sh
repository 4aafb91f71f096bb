#!/bin/sh
# Trains `nano` on the built-in corpus with 0, 2, 10 % and 100 % of the channels rotated, three seeds each, one run per
# core at a time, and prints a table. Runs that are finished are not repeated; one that was stopped goes on.
# Usage: scripts/compare.sh [train flags...], for example scripts/compare.sh --steps 1500
set -u
train=${TRAIN:-build/train}
for seed in 1 2 3; do
  for rotated in "--rotary-fraction 0" "--rotary-dim 2" "--rotary-fraction 0.1" "--rotary-fraction 1"; do
    name=compare$(echo "$rotated-$seed" | tr -d ' ')
    if [ -f "runs/$name/summary.json" ]; then continue; fi
    if [ -f "runs/$name/checkpoint/state.json" ]; then
      echo "--run $name --resume"
    else
      rm -rf "runs/$name"
      echo "--run $name $rotated --seed $seed --threads 1 $*"
    fi
  done
done | xargs -P "$(nproc)" -I ARGS sh -c "$train ARGS >/dev/null || echo 'failed: ARGS' >&2"

echo "| rotated | validation loss, seeds 1, 2, 3 | mean | RoPE table |"
echo "|---|---|---|---|"
for rotated in --rotary-fraction0 --rotary-dim2 --rotary-fraction0.1 --rotary-fraction1; do
  cat runs/compare$rotated-[123]/summary.json | awk -F'[:,]' '
    /"val_loss"/ { losses = losses sprintf(" %.4f", $2); sum += $2; n++ }
    /"rotary_dim"/ { R = $2 } /"head_size"/ { HS = $2 } /"rope_table_bytes"/ { bytes = $2 }
    END { printf "| %d of %d |%s | %.4f | %d bytes |\n", R, HS, losses, sum / n, bytes }'
done
