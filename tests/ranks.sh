#!/bin/sh
# Training on several ranks, as processes on this host's CPU: the same bits as on one rank, and what becomes of all when
# one dies, is killed, differs or does not come. Needs build/train and build/data; writes to a temporary directory only.
# KILLS=50 sh tests/ranks.sh kills ranks at 50 random moments instead of 4.
set -u
programs=$(cd "${BUILD:-build}" && pwd)
. tests/helpers.sh
timeless() { cut -d, -f1-5,7 "runs/$1/log.csv"; } # log.csv without tokens per second
equal() {                                        # equal A B: two runs have the same bits
  for file in model optimizer; do
    if ! cmp -s "runs/$1/checkpoint/$file.safetensors" "runs/$2/checkpoint/$file.safetensors"; then
      fail "$file.safetensors of $1 and $2 differ"
      return
    fi
  done
  for file in val spikes layers tensors; do
    [ ! -e "runs/$1/$file.csv" ] || cmp -s "runs/$1/$file.csv" "runs/$2/$file.csv" || { fail "$file.csv of $1 and $2 differ"; return; }
  done
  timeless "$1" >one.log
  timeless "$2" >other.log
  if cmp -s one.log other.log; then pass; else fail "log.csv of $1 and $2 differ"; fi
}
wait_for() { # wait_for SECONDS COMMAND...: until it succeeds
  until=$(($(date +%s) + $1))
  shift
  while ! "$@" >/dev/null 2>&1; do
    [ "$(date +%s)" -ge $until ] && return 1
    sleep 0.05
  done
}
rows() { cat "runs/$1/log.csv" 2>/dev/null | wc -l; }
has_rows() { [ "$(rows "$1")" -gt "$2" ]; }
gone() { # gone PID...: none of these processes is there
  for gone_pid; do kill -0 "$gone_pid" 2>/dev/null && return 1; done
  return 0
}
children() { cat /proc/[0-9]*/stat 2>/dev/null | awk -v parent="$1" '$4 == parent { print $1 }' | sort -n | tr '\n' ' '; }

"$programs/data" stories --out data --bytes 60000 --seed 3 >out 2>err || exit 1
train="$programs/train --data data/train_*.bin --layers 2 --width 32 --heads 2 --context 32 --batch 2 --val-tokens 256 --accumulate 4"

# ---- The same bits on 1, 2 and 4 ranks ---------------------------------------------------------------------------------
for variant in "" "--block parallel --norm layer --mlp gelu --bias --tied --z-loss 1e-4 --qk-clip 0.02" "--qk-norm --kv-heads 1 --recompute"; do
  rm -rf runs
  for ranks in 1 2 4; do
    check "$ranks ranks $variant" $train $variant --run "r$ranks" --ranks $ranks --lanes 4 --steps 20 --diagnostics-every 5
  done
  equal r1 r2
  equal r1 r4
done
check "lanes are as many as ranks" $train --run default --ranks 4 --steps 20 --qk-norm --kv-heads 1 --recompute --diagnostics-every 5
equal r1 default
check "one lane" $train --run lane --steps 20 --qk-norm --kv-heads 1 --recompute --diagnostics-every 5
check "one lane has other bits" test "$(cmp -s runs/lane/checkpoint/model.safetensors runs/r1/checkpoint/model.safetensors; echo $?)" -eq 1
check "8 lanes of 1 micro-batch" $train --accumulate 8 --run l1 --lanes 8 --steps 5
check "8 lanes on 2 ranks" $train --accumulate 8 --run l2 --lanes 8 --steps 5 --ranks 2
equal l1 l2

# ---- Resume and replay on another number of ranks --------------------------------------------------------------------------
constant="--schedule constant --warmup 0 --lanes 4"
check "30 steps straight" $train $constant --run straight --steps 30
check "10 steps on 4" $train $constant --run moved --steps 10 --ranks 4
check "10 more on 1" "$programs/train" --run moved --resume --steps 20
check "10 more on 2" "$programs/train" --run moved --resume --steps 30 --ranks 2
for file in model optimizer; do
  check "4, 1, 2 ranks: $file" cmp runs/straight/checkpoint/$file.safetensors runs/moved/checkpoint/$file.safetensors
done
for ranks in 1 2; do
  check "replay on $ranks" "$programs/train" --run r4 --replay-step 15 --ranks $ranks
  mv out said
  check "as it was" grep -q "are those of the run's log.csv" said
  grep -E "^(step|5|10|15)," runs/r4/tensors.csv >wanted
  check "the same diagnostics" cmp runs/r4/replay-15/tensors.csv wanted
  check "8 windows" test "$(wc -l <runs/r4/replay-15/windows.csv)" -eq 9
  mv runs/r4/replay-15 "replay$ranks"
done
check "the same replay on 1 and 2" diff -r replay1 replay2

# ---- Mistakes ------------------------------------------------------------------------------------------------------------
refuse "lanes 4: must be a multiple of the number of ranks, 3" $train --lanes 4 --ranks 3
refuse "accumulate 4: must be a multiple of --lanes 3" $train --ranks 3
refuse "lanes 4: .* ranks, 3" "$programs/train" --run moved --resume --steps 40 --ranks 3
refuse "lanes is 2 but was 4" "$programs/train" --run moved --resume --steps 40 --lanes 2
refuse "ranks 0" $train --ranks 0
refuse "did you mean --layers" $train --ranks 2 --layrs 3
refuse "runs/moved exists" $train --ranks 2 --run moved
refuse "rank 1 on .*(RANK)|RANK=2: must be below WORLD_SIZE=2" env RANK=2 WORLD_SIZE=2 $train
refuse "one of 2 ranks already" env RANK=0 WORLD_SIZE=2 $train --ranks 2

# Ranks that others start: the environment of torchrun, mpirun, srun.
port=$((20000 + $$ % 10000))
pair() { # pair NAME COMMAND0 -- COMMAND1: two processes; leaves exit codes in code0 and code1, what they say in err0, err1
  port=$((port + 1))
  first="" second="" seen=""
  for word; do
    if [ "$word" = -- ]; then seen=1
    elif [ -z "$seen" ]; then first="$first $word"
    else second="$second $word"; fi
  done
  env MASTER_PORT=$port $first >out0 2>err0 &
  pid0=$!
  env MASTER_PORT=$port $second >out1 2>err1 &
  wait $!
  code1=$?
  wait $pid0
  code0=$?
}
pair RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 $train --lanes 4 --run torch --steps 5 -- RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 $train --lanes 4 --run torch --steps 5
check "torchrun" test $code0$code1 -eq 0
check "only rank 0 prints" test ! -s out1
slurm="SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=77"
pair $slurm SLURM_PROCID=0 SLURM_LOCALID=0 $train --lanes 4 --run slurm --steps 5 -- $slurm SLURM_PROCID=1 SLURM_LOCALID=1 $train --lanes 4 --run slurm --steps 5
check "srun" test $code0$code1 -eq 0
equal torch slurm
disagree() { # disagree PATTERN COMMAND0 -- COMMAND1: both end with exit code 2, and rank 0 says why, in one line
  pattern=$1
  shift
  pair "$@"
  if [ $code0$code1 = 22 ] && grep -qE "$pattern" err0 && [ "$(cat err0 err1 | wc -l)" -eq 1 ]; then pass; else
    cat err0 err1 >err
    fail "exit $code0 and $code1, wanted 2, 2 and one line with '$pattern': $*"
  fi
}
two="WORLD_SIZE=2"
disagree "rank 1 on .* is one of 3 ranks" RANK=0 $two $train --lanes 4 --steps 5 -- RANK=1 WORLD_SIZE=3 $train --lanes 4 --steps 5
disagree "rank 1 on .*: lr is 0.5 but 0.003 on rank 0" RANK=0 $two $train --lanes 4 --steps 5 -- RANK=1 $two $train --lanes 4 --steps 5 --lr 0.5
disagree "rank 1 on .*: train_missing.bin: cannot open shard" RANK=0 $two $train --lanes 4 --steps 5 -- RANK=1 $two $train --lanes 4 --steps 5 --data train_missing.bin
cp "$programs/train" other && echo >>other
disagree "rank 1 on .* runs another program" RANK=0 $two $train --lanes 4 --steps 5 -- RANK=1 $two ./other --data "data/train_*.bin" --steps 5
port=$((port + 1))
MASTER_PORT=$port RANK=0 WORLD_SIZE=2 $train --steps 5 >out 2>err0 &
waiting=$!
sleep 0.5
refuse "MASTER_PORT $port: in use" env MASTER_PORT=$port RANK=0 WORLD_SIZE=2 $train --steps 5
kill $waiting
wait $waiting 2>/dev/null

# ---- Signals ----------------------------------------------------------------------------------------------------------------
start() { # start NAME RANKS FLAGS...: a long run in the background, once it has made some steps; leaves its pids
  run=$1
  started=$2
  shift 2
  "$@" --run "$run" --ranks "$started" >said 2>said.err &
  launcher=$!
  wait_for 20 has_rows "$run" 5
  pids=$(children $launcher)
}
long="$train $constant --steps 100000 --checkpoint-every 100000"
for signal in INT TERM; do
  start "stop$signal" 4 $long
  kill -$signal $launcher
  wait $launcher
  code=$?
  check "SIG$signal: exit code 128 + signal" test $code -eq $([ $signal = INT ] && echo 130 || echo 143)
  check "SIG$signal: saved once" test "$(grep -c 'Interrupted: saved at step' said)" -eq 1
  check "SIG$signal: at its last step" grep -q "\"step\": $(($(rows "stop$signal") - 1))," "runs/stop$signal/checkpoint/state.json"
  check "SIG$signal: nothing left" gone $pids
done
start stopone 4 $long
kill -TERM "$(echo $pids | cut -d' ' -f3)" # of one rank alone
wait $launcher
check "SIGTERM to one rank: exit code 143" test $? -eq 143
check "SIGTERM to one rank: all save" test -s runs/stopone/checkpoint/state.json
start orphans 4 $long
kill -KILL $launcher
wait $launcher 2>/dev/null
check "the launcher killed: all gone" wait_for 10 gone $pids
check "the launcher killed: one line" test "$(grep -c 'the program that started the ranks has ended' said.err)" -eq 1

# A disk that is full while rank 0 saves.
cp -r runs/straight runs/full
(trap '' XFSZ; ulimit -f 60; exec "$programs/train" --run full --resume --steps 32 --checkpoint-every 1 --ranks 4) >said 2>said.err
check "disk full: exit code 2" test $? -eq 2
check "disk full: one line" test "$(grep -c 'cannot write: File too large' said.err) $(wc -l <said.err)" = "1 1"
check "disk full: old checkpoint unchanged" diff -r runs/straight/checkpoint runs/full/checkpoint

# ---- Killed at random moments, again and again; what is left at the end is what a run without all that has ---------------------
steps=$((400 + 400 * ${KILLS:-4}))  # so many that none has ended when it is killed
killed="$train $constant --steps $steps --checkpoint-every 7"
check "$steps steps straight" $killed --run unharmed
i=0
again="$killed"
while [ $i -lt "${KILLS:-4}" ]; do
  i=$((i + 1))
  $again --run harmed --ranks 4 >out 2>err &
  launcher=$!
  wait_for 60 has_rows harmed $((400 * (i - 1) + $(awk -v seed="$i$$" 'BEGIN { srand(seed); printf "%d", 2 + rand() * 300 }')))
  pids=$(children $launcher)
  victim=$((i % 4 + 1))
  before=$(date +%s)
  kill -KILL "$(echo $pids | cut -d' ' -f$victim)" 2>/dev/null
  wait $launcher
  code=$?
  if [ $(($(date +%s) - before)) -ge 10 ] || ! gone $pids; then fail "kill $i: not all gone within 10 s"; fi
  if [ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -qE "rank $((victim - 1)) .*(ended|signal 9)" err; then pass; else
    fail "kill $i of rank $((victim - 1)): exit code $code, wanted 1 and one line that names it"
  fi
  again="$programs/train --resume"
  [ -e runs/harmed/checkpoint/state.json ] || [ -e runs/harmed/checkpoint.old/state.json ] || { rm -rf runs/harmed; again="$killed"; }
done
check "to the end" $again --run harmed --ranks 2
equal unharmed harmed

echo "ranks: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
