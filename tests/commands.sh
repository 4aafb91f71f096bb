#!/bin/sh
# The programs as a user meets them: a run from beginning to end, resume, interruption, and one line and exit code 2 for
# every mistake. Needs build/train, build/data, build/eval; writes to a temporary directory only.
set -u
programs=$(cd "${BUILD:-build}" && pwd)
fixtures=$(pwd)/tests/fixtures
. tests/helpers.sh
timeless() { cut -d, -f1-5,7 "$1"; }  # log.csv without tokens per second
same() { if cmp -s "$2" "$3"; then pass; else fail "$1: $2 and $3 differ"; fi; }

train="$programs/train --data data/train_*.bin --layers 2 --width 32 --heads 2 --context 32 --batch 2 --val-tokens 256"

# ---- A small run, from nothing to a sample -----------------------------------------------------------------------
check "stories" "$programs/data" stories --out data --bytes 60000 --seed 3
check "info" "$programs/data" info "data/val_*.bin"
check "training" $train --run straight --steps 20 --checkpoint-every 10
for file in config.json log.csv val.csv spikes.csv summary.json report.html page.html checkpoint/model.safetensors checkpoint/optimizer.safetensors checkpoint/state.json; do
  check "$file is there" test -s "runs/straight/$file"
done
check "20 rows of log" test "$(wc -l <runs/straight/log.csv)" -eq 21
check "sampling" "$programs/eval" sample --run straight --tokens 20
check "loss" "$programs/eval" loss --run straight
check "trace" "$programs/eval" trace --run straight --prompt "Ann ran, Bob sat."
check "a page of the trace" "$programs/eval" trace --run straight --prompt "Ann ran, Bob sat." --html page.html
check "the page" grep -q "</html>" page.html
refuse "nowhere/page.html: cannot write" "$programs/eval" trace --run straight --prompt "Ann" --html nowhere/page.html
check "memory" "$programs/eval" memory --preset llama-1b
check "logits" "$programs/eval" logits --run straight --tokens 1,2,3 --out logits.npy
check "logits: (3, 264) fp32 behind the header" test "$(wc -c <logits.npy)" -gt $((3 * 264 * 4))
mkdir text && printf 'one\n<|endoftext|>\ntwo three\n' >text/input.txt
check "encode" "$programs/data" encode --input text/input.txt --out text/shards --val-fraction 0
"$programs/data" decode text/shards/train_000.bin >text/decoded 2>err
same "decode gives the text back" text/decoded text/input.txt

check "encode again" "$programs/data" encode --input text/input.txt --out text/shards --val-fraction 0
grep -q "note: text/shards holds shards (16 tokens" err && pass || fail "says what it replaces"
cp text/input.txt text/again.txt
tar -cf text/archive.tar -C text input.txt again.txt
check "encode an archive" "$programs/data" encode --input text/archive.tar --out "text/r[1]" --val-fraction 0
check "4 documents, in a directory with brackets" "$programs/data" info "text/r[1]/train_*.bin"
grep -q "4 documents" out && pass || fail "4 documents"
printf '{"text": "a"}\n{"text": 5}\n' >text/lines.jsonl
refuse "lines.jsonl, line 2: .*--skip-bad" "$programs/data" encode --input text/lines.jsonl --field text --out text/lines
refuse "skip-bad.*--field" "$programs/data" encode --input text/lines.jsonl --skip-bad --out text/lines
check "without bad lines" "$programs/data" encode --input text/lines.jsonl --field text --skip-bad --val-fraction 0 --out text/lines
grep -q "note: 1 line left out, the first: .*line 2" err && pass || fail "and how many"
printf '%%PDF-1.7' >text/paper.pdf
refuse "paper.pdf: is no text but PDF" "$programs/data" encode --input text/paper.pdf --out text/pdf
printf x | dd of=text/shards/train_000.bin bs=1 seek=1024 conv=notrunc 2>/dev/null
refuse "train_000.bin: its content" "$programs/data" info text/shards/train_000.bin

# ---- Another tokenizer, from text to text ----------------------------------------------------------------------------
"$programs/data" decode data/train_000.bin --tokens 30000 >plain.txt 2>err
check "encode with BPE" "$programs/data" encode --input plain.txt --tokenizer "$fixtures/tokenizer.json" --out bpe
"$programs/data" decode bpe/train_000.bin >decoded 2>err
head -c "$(wc -c <decoded)" plain.txt >start
same "decode gives the beginning back" decoded start
"$programs/data" encode --input - --tokenizer bpe/tokenizer.json --val-fraction 0 --out piped <plain.txt >out 2>err
"$programs/data" decode piped/train_000.bin >decoded 2>err
same "standard input" decoded plain.txt
check "training on BPE" $train --data "bpe/train_*.bin" --run bpe --steps 3
refuse "error: --data bpe/train_.*: its tokenizer is.*ids mean different text" "$programs/eval" loss --run straight --data "bpe/train_*.bin"
refuse "error: --data bpe/train_.*: its tokenizer is.*ids mean different text" "$programs/train" --run straight --resume --steps 30 --data "bpe/train_*.bin"
cat bpe/tokenizer.json >tokenizer.json && rm -r bpe
check "sampling without the shards" "$programs/eval" sample --run bpe --tokens 5
same "the run has its tokenizer" runs/bpe/tokenizer.json tokenizer.json
refuse "nowhere.json" "$programs/data" encode --input plain.txt --tokenizer nowhere.json --out no
refuse "text/input.txt" "$programs/data" encode --input plain.txt --tokenizer text/input.txt --out no
refuse "line 1" "$programs/data" encode --input plain.txt --field text --out no
refuse "did you mean --tokenizer" "$programs/data" encode --input plain.txt --tokeniser bytes --out no
refuse "did you mean decode" "$programs/data" decoed data/train_000.bin

# ---- Data sets by name, from a mirror that stands in for the net -------------------------------------------------------
mkdir mirror
mirror="file://$work/mirror"
sum() { sha256sum "$1" | cut -c1-64; }
cat plain.txt >mirror/input.txt
refuse "SHA-256" "$programs/data" fetch shakespeare --url "$mirror"
check "nothing is left of a wrong file" test ! -e data/shakespeare/input.txt.part
check "shakespeare" "$programs/data" fetch shakespeare --url "$mirror" --sha256 "$(sum mirror/input.txt)"
check "training on it" $train --data "data/shakespeare/train_*.bin" --run shakespeare --steps 1
cat plain.txt >mirror/TinyStoriesV2-GPT4-train.txt
printf 'for validation\n' >mirror/TinyStoriesV2-GPT4-valid.txt
mkdir -p data/tinystories && head -c 10000 plain.txt >data/tinystories/TinyStoriesV2-GPT4-train.txt.part
check "tinystories, continued" "$programs/data" fetch tinystories --url "$mirror" --tokenizer "$fixtures/tokenizer.json"
same "the whole file" data/tinystories/TinyStoriesV2-GPT4-train.txt plain.txt
"$programs/data" decode data/tinystories/val_000.bin >decoded 2>err
same "the file for validation" decoded mirror/TinyStoriesV2-GPT4-valid.txt
refuse "offline: .*--url" "$programs/data" fetch wikitext --url "$mirror" --out nowhere
truncate -s 15T mirror/TinyStoriesV2-GPT4-train.txt 2>/dev/null &&
  refuse "not enough space" "$programs/data" fetch tinystories --url "$mirror" --out nowhere
check "nothing written" test ! -e nowhere

# GPT-2's tokens in somebody else's shards; a tokenizer of GPT-2's size stands in for its own.
cp data/val_000.bin mirror/fineweb_val_000000.bin
for i in 1 2; do cp data/train_000.bin mirror/fineweb_train_00000$i.bin; done
check "fineweb" "$programs/data" fetch fineweb --url "$mirror" --shards 2
refuse "no meta.json beside it that names" "$programs/data" decode data/fineweb/fineweb_val_000000.bin
awk '{ at = index($0, "\"vocab\":{") + 8
       printf "%s", substr($0, 1, at)
       for (i = 419; i < 50256; i++) printf "\"token%d\":%d,", i, i
       print substr($0, at + 1) }' "$fixtures/tokenizer.json" | sed 's/"id":419/"id":50256/' >mirror/tokenizer.json
check "fineweb's tokenizer" "$programs/data" fetch fineweb --url "$mirror" --shards 2
check "fineweb as text" "$programs/data" decode data/fineweb/fineweb_val_000000.bin
check "info" "$programs/data" info "data/fineweb/fineweb_train_*.bin"
check "training on fineweb" $train --data "data/fineweb/fineweb_train_*.bin" --run fineweb --steps 1
rm data/fineweb/meta.json
refuse "vocab: needed" $train --data "data/fineweb/fineweb_train_*.bin" --run other --steps 1
check "training without meta.json" $train --data "data/fineweb/fineweb_train_*.bin" --run other --steps 1 --vocab 50304
refuse "shards 104: fineweb has 1 to 103" "$programs/data" fetch fineweb --shards 104
refuse "did you mean fineweb-edu" "$programs/data" fetch finewebedu

# ---- Hugging Face's format, there and back, and on from there ---------------------------------------------------------
check "export" "$programs/eval" export --run straight --out hf
check "import" "$programs/eval" import --from hf --run back
same "the same weights" runs/straight/checkpoint/model.safetensors runs/back/checkpoint/model.safetensors
check "training on from an import" $train --run more --init back --steps 2
same "a fresh start has not moved yet" runs/straight/checkpoint/model.safetensors runs/back/checkpoint/model.safetensors
refuse "width is .* but was" $train --init back --width 64
check "another position code on trained weights" $train --init back --rotary-dim 4 --rope-base 500 --run recoded --steps 1
grep -q "Changed: .*rotary_dim 4 (was 2), rope_base 500.0 (was 10000.0)" out && pass || fail "what changed is said"
refuse "rotary-layers.*one for each layer" $train --rotary-layers 4,4,0
refuse "rotary-layers 4,0: up to 4 .* mean 2" $train --rotary-layers 4,0 --rotary-dim 2
refuse "rope-frequencies .*wavelengths" $train --rotary-dim 4 --rope-frequencies 6.3
refuse "rope-scaling yarn:2: must be none" $train --rope-scaling yarn:2
refuse "no checkpoint" $train --init nothing
touch runs/file && refuse "run file: runs/file exists" $train --run file --steps 1
refuse "not enough memory.*--batch [0-9]* fits" $train --run big --batch 99999999
refuse "hf: exists" "$programs/eval" export --run straight --out hf
refuse "runs/back: exists" "$programs/eval" import --from hf --run back
check "a model without a class" $train --run paper --block parallel --steps 1
refuse "block parallel" "$programs/eval" export --run paper --out paper
check "with code" "$programs/eval" export --run paper --out paper --with-code
check "import of it" "$programs/eval" import --from paper --run paper-back
same "the same weights with code" runs/paper/checkpoint/model.safetensors runs/paper-back/checkpoint/model.safetensors
sed 's/"partial_rotary_factor": [0-9.]*/"partial_rotary_factor": 7/' hf/config.json >changed && mv changed hf/config.json
refuse "partial_rotary_factor" "$programs/eval" import --from hf --run other
rm hf/model.safetensors
refuse "hf/" "$programs/eval" import --from hf --run other

# ---- Benchmarks ---------------------------------------------------------------------------------------------------
cat >questions.jsonl <<'END'
{"query": "Ann ran, Bob sat. Second? ", "choices": ["Bob.", "Ann."], "gold": 0}
{"context_options": ["Pack rug", "Pack egg"], "continuation": "rug.", "gold": 1}
END
echo '{"context": "Ann ran, Bob", "continuation": "sat."}' | gzip >words.jsonl.gz
check "choices" "$programs/eval" choices --run straight --data questions.jsonl --out choices.json
check "choices: results" grep -q '"accuracy_per_byte":.*"log_likelihoods":\[\[-.*,-.*\],\[-.*,-.*\]\]' choices.json
check "lambada, compressed" "$programs/eval" lambada --run straight --data words.jsonl.gz --out words.json
check "lambada: results" grep -q '"perplexity":.*"log_likelihoods":\[\[-[0-9.]*\]\]' words.json
check "positions" "$programs/eval" positions --run straight --tokens 1000 --out positions.csv
check "positions: 1, 1, 2, 4, ... to 32" test "$(cut -d, -f3 positions.csv | tr '\n' ' ')" = "end 1 2 4 8 16 32 "
check "length" "$programs/eval" length --run straight --tokens 1000 --out length.csv
check "length: the same targets" grep -qE "^256,3,[0-9.]+,[0-9.]+,-?[0-9.]+," length.ends.csv
check "length: nothing changed" "$programs/eval" length --run straight --tokens 300 --out unchanged.csv
for change in "--rope-scale 4" "--rope-scale 0" "--yarn 0" "--rotary-dim 0" "--attention-temperature 0.9"; do
  check "length $change" "$programs/eval" length --run straight --tokens 300 --out changed.csv $change
  if cmp -s changed.ends.csv unchanged.ends.csv; then fail "length $change changes nothing"; else pass; fi
done
refuse "rope-scale, --yarn" "$programs/eval" length --run straight --rope-scale 2 --yarn 2
refuse "rotary-dim 3" "$programs/eval" length --run straight --rotary-dim 3
check "length: up to 8 times 32" test "$(tail -1 length.csv | cut -d, -f1-4)" = "256,128,256,3"
refuse "one answer only; eval lambada" "$programs/eval" choices --run straight --data words.jsonl.gz
refuse "several choices; eval choices" "$programs/eval" lambada --run straight --data questions.jsonl
refuse "data \"nowhere\"" "$programs/eval" choices --run straight --data nowhere
refuse "data \"\"" "$programs/eval" lambada --run straight
echo '{"query": "Who?"' >>questions.jsonl
refuse "questions.jsonl, line 3" "$programs/eval" choices --run straight --data questions.jsonl
echo "{\"context\": \"A\", \"continuation\": \"$(head -c 40 /dev/zero | tr '\0' x)\"}" >long.jsonl
refuse "every question has an answer .* context of 32" "$programs/eval" lambada --run straight --data long.jsonl
cat words.jsonl.gz | gzip -d >>long.jsonl
check "what is too long is left out" "$programs/eval" lambada --run straight --data long.jsonl --out words.json
check "and counted" grep -q '"questions":1,.*"left_out":1' words.json
check "a shorter context" "$programs/eval" sample --run straight --tokens 40 --context 8
refuse "context 64: the model was trained with 32" "$programs/eval" sample --run straight --context 64
# Memory follows what is computed: 20 tokens of a model of 65,536 positions, whose full window would take 6 GB.
sed 's/"context": 32/"context": 65536/' runs/straight/checkpoint/state.json >state && cp -r runs/straight runs/wide && mv state runs/wide/checkpoint/state.json
check "few tokens of a long context" sh -c "ulimit -v 1500000; OMP_NUM_THREADS=2 '$programs/eval' sample --run wide --tokens 20 && '$programs/eval' loss --run wide --tokens 1"
refuse "context longer than the shard" "$programs/eval" length --run straight --data "text/r[1]/train_000.bin"
refuse "tokens 0" "$programs/eval" positions --run straight --tokens 0

# ---- The same to the bit: threads, interruption, kill ------------------------------------------------------------------
check "one thread" $train --run one --steps 20 --threads 1
check "three threads" $train --run three --steps 20 --threads 3
check "more threads than cores" $train --run many --steps 1 --threads 1000
cp err said
check "are said and not taken" grep -q "note: --threads 1000: there are [0-9]* cores here" said
same "threads do not change the weights" runs/one/checkpoint/model.safetensors runs/three/checkpoint/model.safetensors
same "nor do checkpoints on the way" runs/one/checkpoint/model.safetensors runs/straight/checkpoint/model.safetensors

# Text with a few lines of what nobody would expect at its end: their windows make the loss spike.
{
  cat plain.txt
  i=0
  while [ $i -lt 4 ]; do
    printf '##@@%%%%^^&&**~~``||__==++<<>>$$QQXXZZ'
    i=$((i + 1))
  done
} >spiky.txt
check "encode" "$programs/data" encode --input spiky.txt --out spiky --val-fraction 0
spiky="$train --data spiky/train_000.bin --val data/val_000.bin"

# Ends a run by a signal halfway, after 200 of 400 rows of its log and before the loss spikes, and goes on with it to the end.
interrupt() { # interrupt NAME SIGNAL STEPS [CHECKPOINT_EVERY]
  $spiky --run "$1" --steps "$3" --checkpoint-every "${4:-1}" --diagnostics-every 30 >out 2>err &
  pid=$!
  tries=0
  while [ "$(cat "runs/$1/log.csv" 2>/dev/null | wc -l)" -lt 200 ] && [ $tries -lt 400 ]; do
    sleep 0.02
    tries=$((tries + 1))
  done
  kill "-$2" $pid 2>/dev/null
  wait $pid 2>/dev/null
  code=$?
}
check "400 steps straight" $spiky --run long --steps 400
check "400 steps with diagnostics" $spiky --run looked --steps 400 --diagnostics-every 30
same "diagnostics change nothing" runs/looked/checkpoint/model.safetensors runs/long/checkpoint/model.safetensors
same "nor the optimizer" runs/looked/checkpoint/optimizer.safetensors runs/long/checkpoint/optimizer.safetensors
check "14 diagnostics of 2 layers with 2 heads" test "$(wc -l <runs/looked/layers.csv)" -eq $((14 * 4 + 1))
check "spikes, after the half" test "$(sed -n 2p runs/looked/spikes.csv | cut -d, -f1)" -gt 250
check "of 15 tensors" test "$(wc -l <runs/looked/tensors.csv)" -eq $((14 * 15 + 1))
for signal in INT TERM KILL; do
  interrupt "stop$signal" $signal 400
  case $signal in INT) wanted=130 ;; TERM) wanted=143 ;; *) wanted=137 ;; esac
  check "exit code after SIG$signal" test $code -eq $wanted
  check "SIG$signal came before the end" test "$(wc -l <runs/stop$signal/log.csv)" -lt 400
  check "resume after SIG$signal" "$programs/train" --run "stop$signal" --resume
  same "resumed after SIG$signal" "runs/stop$signal/checkpoint/model.safetensors" runs/long/checkpoint/model.safetensors
  same "optimizer after SIG$signal" "runs/stop$signal/checkpoint/optimizer.safetensors" runs/long/checkpoint/optimizer.safetensors
  check "400 rows of log" test "$(wc -l <runs/stop$signal/log.csv)" -eq 401
  for file in layers tensors spikes; do
    same "$file.csv after SIG$signal" runs/stop$signal/$file.csv runs/looked/$file.csv
  done
  timeless runs/stop$signal/log.csv >resumed && timeless runs/looked/log.csv >straight
  same "log.csv after SIG$signal, but for its tokens per second" resumed straight
  for key in spike_score_128 spike_score_1000 clip_rate nonfinite max_logit max_logit_ever entropy_min train_loss; do
    check "$key after SIG$signal" test "$(grep "\"$key\"" runs/stop$signal/summary.json)" = "$(grep "\"$key\"" runs/looked/summary.json)"
  done
done
timeless runs/long/log.csv >without
same "diagnostics change nothing in log.csv" without straight

# A step that takes minutes: the first Ctrl-C says what it does, the second ends at once.
$train --run endless --steps 2 --accumulate 1000000 >out 2>said &
pid=$!
tries=0
while [ ! -e runs/endless/log.csv ] && [ $tries -lt 200 ]; do sleep 0.02; tries=$((tries + 1)); done
sleep 0.2
kill -INT $pid
sleep 0.4
check "one Ctrl-C does not end it" kill -0 $pid
check "it says so" grep -q "step is finished and saved; Ctrl-C again ends at once" said
kill -INT $pid
wait $pid 2>/dev/null
check "two do" test $? -eq 130
if command -v script >/dev/null; then
  script -qec "stty cols 60; $train --run narrow --accumulate 50 --steps 3" seen >out 2>err
  check "micro-batches are seen before the first step ends" grep -q "step 1/3 micro-batch 1/50" seen
fi

# ---- Repeating a step ------------------------------------------------------------------------------------------------
replay() { # replay RUN STEP: leaves what it says in the file replayed
  "$programs/train" --run "$1" --replay-step "$2" >replayed 2>err
}
logged="are those of the run's log.csv"
cp -r runs/looked before
check "replay from the start" replay looked 30
check "as in the log" grep -q "$logged" replayed
check "from the initial weights" grep -q "steps 1 to 30 .*initial weights (the checkpoint, of step 400, is too late)" replayed
check "2 windows" test "$(wc -l <runs/looked/replay-30/windows.csv)" -eq 3
check "replay of all steps" replay looked 400
for file in layers tensors; do
  grep -E "^(step|30)," runs/looked/$file.csv >wanted
  same "$file.csv of step 30" runs/looked/replay-30/$file.csv wanted
  same "$file.csv of all steps" runs/looked/replay-400/$file.csv runs/looked/$file.csv
done
rm -r runs/looked/replay-*
spike=$(tail -n 1 runs/looked/spikes.csv | cut -d, -f1)
check "replay of a spike" replay looked "$spike"
check "an odd line is in the window with the largest loss" sh -c "grep -A 1 'largest loss' replayed | grep -q '##@@\|QQXX\|<<>>'"
rm -r runs/looked/replay-*
check "a replay changes nothing of the run" diff -r before runs/looked
rm -r before
constant="$train --schedule constant --warmup 0"
check "20 steps" $constant --run twenty --steps 20
check "10 steps of the same" $constant --run ten --steps 10
rm -r runs/twenty/checkpoint && cp -r runs/ten/checkpoint runs/twenty/
check "replay from a checkpoint" replay twenty 20
check "from step 10" grep -q "steps 11 to 20 .*checkpoint of step 10" replayed
check "as in the log" grep -q "$logged" replayed
sed -i 's/"step": 10,/"step": 9,/' runs/twenty/checkpoint/state.json
replay twenty 20
check "another past: exit code 1" test $? -eq 1
check "another past: which step" grep -q "not how the run went: step 10 " replayed
refuse "replay-step 0.*1 to 20" "$programs/train" --run straight --replay-step 0
refuse "replay-step 21.*1 to 20" "$programs/train" --run straight --replay-step 21
refuse "replay-step 5.*--run" "$programs/train" --replay-step 5
refuse "replay-step 5.*runs/nothing/log.csv" "$programs/train" --run nothing --replay-step 5
refuse "lr is" "$programs/train" --run straight --replay-step 5 --lr 0.5
refuse "give one of them" "$programs/train" --run straight --replay-step 5 --resume

# A machine that stops between the two renames of a save leaves checkpoint.old.
cp -r runs/straight runs/between && mv runs/between/checkpoint runs/between/checkpoint.old
check "resume from checkpoint.old" "$programs/train" --run between --resume --steps 21

# ---- Help ---------------------------------------------------------------------------------------------------------
"$programs/train" --help >help 2>err
for default in "--layers INT.*4\W" "--lr FLOAT.*0.003\W" "--rotary-fraction FLOAT.*0.1\W" "--seed UINT.*1\W"; do
  check "help: $default" grep -q -e "$default" help
done
check "version" sh -c "'$programs/train' --version | grep -q 'partial-rope [0-9]'"

# ---- Mistakes ----------------------------------------------------------------------------------------------------------
refuse "rotary-dim 3.*even" $train --rotary-dim 3
refuse "rotary-dim 18.*head size 16" $train --rotary-dim 18
refuse "rotary-dim -2" $train --rotary-dim -2
refuse "rotary-fraction 1.5" $train --rotary-fraction 1.5
refuse "rotary-fraction -0.1" $train --rotary-fraction -0.1
refuse "rotary-fraction nan" $train --rotary-fraction nan
refuse "disagree.*16 channels" $train --rotary-fraction 0.5 --rotary-dim 4
refuse "heads 3.*width 32" $train --heads 3
refuse "kv-heads 3.*heads 4" $train --heads 4 --kv-heads 3
refuse "layers 0" $train --layers 0
refuse "width -8" $train --width -8
refuse "batch 0" $train --batch 0
refuse "steps -1" $train --steps -1
refuse "lr nan" $train --lr nan
refuse "lr inf:" $train --lr inf
for seed in -1 18446744073709551616 1.5 x; do refuse "seed $seed: must be" $train "--seed=$seed"; done
refuse "lr 0" $train --lr 0
refuse "lr.*abc" $train --lr abc
refuse "beta1 1" $train --beta1 1
refuse "qk-clip -1" $train --qk-clip -1
refuse "qk-clip: not with --qk-norm" $train --qk-clip 10 --qk-norm
refuse "did you mean --layers" $train --layrs 3
refuse "did you mean nano" $train --preset nanno
refuse "block sideways" $train --block sideways
refuse "device tpu" $train --device tpu
refuse "bf16" $train --device cpu --dtype bf16
refuse "context longer than the shard" $train --context 100000
refuse "no shard matches" $train --data "nowhere/train_*.bin"
refuse "nosuch.bin: cannot open shard: No such file" $train --data nosuch.bin
refuse "not below the vocabulary of 100" $train --vocab 100

shard() { # shard NAME: a copy of the data under another name, to be damaged
  rm -rf "$1" && cp -r data "$1"
}
shard cut && head -c 5000 data/train_000.bin >cut/train_000.bin
refuse "cut/train_000.bin.*truncated" $train --data "cut/train_*.bin"
head -c 100 data/train_000.bin >cut/train_000.bin
refuse "cut/train_000.bin" $train --data "cut/train_*.bin"
: >cut/train_000.bin
refuse "cut/train_000.bin.*empty" $train --data "cut/train_*.bin"
shard magic && printf 'x' | dd of=magic/train_000.bin conv=notrunc 2>/dev/null
refuse "magic" $train --data "magic/train_*.bin"
shard version && printf '\007' | dd of=version/train_000.bin bs=1 seek=4 conv=notrunc 2>/dev/null
refuse "version" $train --data "version/train_*.bin"

# ---- A run that goes on as another, and what nothing was saved of ---------------------------------------------------
check "20 steps" $train --run longer --steps 20
check "extended" $train --run longer --resume --steps 30
cp out said
check "the jump is announced" grep -q "learning rate goes from 0.0003 (step 20) to 0.000975" said
for step in 7 25; do
  check "replay of step $step" replay longer $step
  check "as it was" grep -q "$logged" replayed
done
check "history" test "$(grep -c '"steps_before"' runs/longer/history.json)" -eq 2
cp -r data moved && "$programs/data" stories --out moved --bytes 50000 --seed 9 >out 2>err
sed -i "s|data/train_|moved/train_|; s|data/val_|moved/val_|" runs/longer/config.json runs/longer/history.json runs/longer/checkpoint/state.json
refuse "resume: --data moved/train_.*: not the data" "$programs/train" --run longer --resume --steps 40
refuse "replay-step: --data moved/train_.*: not the data" "$programs/train" --run longer --replay-step 7
check "other data on purpose" "$programs/train" --run longer --resume --steps 35 --data "moved/train_*.bin" --val "moved/val_*.bin"
cp err said
check "it is said" grep -q "note: --data moved/train_.*: other data than up to step 30" said
refuse "steps up to 30 were on other data" "$programs/train" --run longer --replay-step 33
refuse "ids mean different text" $train --run no --init bpe
for run in ./away/one "$work/away/two"; do check "--run $run" $train --run "$run" --steps 1; done
check "such a run is found" "$programs/eval" loss --run ./away/one
check "where it was said to be" test -e away/two/checkpoint
refuse "leads out of runs/" $train --run x/../../no --steps 1

interrupt begun KILL 100000 0
check "a kill before the first checkpoint" test ! -e runs/begun/checkpoint
cp -r runs/begun runs/again
check "it begins again, resumed" "$programs/train" --run begun --resume --steps 3
check "and started anew" $train --run again --steps 3
# A clock by which every look at it comes eleven minutes after the one before.
cat >clock.c <<END
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec* t) {
  static long looks;
  const long failed = syscall(SYS_clock_gettime, id, t);
  t->tv_sec += 660 * ++looks;
  return (int)failed;
}
END
if cc -shared -fPIC clock.c -o clock.so 2>err; then
  LD_PRELOAD=$work/clock.so ASAN_OPTIONS=verify_asan_link_order=0 \
    $train --run timed --steps 100000 --checkpoint-every 100000 >out 2>err &
  pid=$!
  tries=0
  while [ ! -e runs/timed/checkpoint/state.json ] && [ $tries -lt 200 ]; do sleep 0.02; tries=$((tries + 1)); done
  kill -KILL $pid
  wait $pid 2>/dev/null
  check "a checkpoint is written every ten minutes as well" test -e runs/timed/checkpoint/state.json
fi
check "train to be locked" sh -c "$train --run locked --steps 100000 >/dev/null 2>&1 & echo \$! >pid"
tries=0
while [ ! -s runs/locked/log.csv ] && [ $tries -lt 200 ]; do sleep 0.02; tries=$((tries + 1)); done
refuse "another process is training" "$programs/train" --run locked --resume
refuse "another process is training" $train --run locked --steps 1
kill "$(cat pid)"

# A row that a machine did not finish when it stopped, at the checkpoint's step.
cp -r runs/straight runs/torn && head -c -30 runs/straight/log.csv >runs/torn/log.csv
check "resume behind half a row" "$programs/train" --run torn --resume --steps 22
check "every row is whole" sh -c "! grep -qvE '^([^,]*,){6}[^,]+$' runs/torn/log.csv"

refuse "runs/straight exists" $train --run straight
refuse "no checkpoint" "$programs/train" --run nothing --resume
refuse "width is 64 but was 32" "$programs/train" --run straight --resume --width 64
refuse "lr is" "$programs/train" --run straight --resume --lr 0.5
cp -r runs/straight runs/broken
head -c 2000 runs/straight/checkpoint/model.safetensors >runs/broken/checkpoint/model.safetensors
refuse "broken/checkpoint/model.safetensors.*truncated" "$programs/train" --run broken --resume --steps 30
cp runs/long/checkpoint/state.json runs/broken/checkpoint/
sed -i 's/"width": 32/"width": 48/; s/"head_size": 16/"head_size": 24/' runs/broken/checkpoint/state.json
cp runs/straight/checkpoint/model.safetensors runs/broken/checkpoint/
refuse "shape" "$programs/train" --run broken --resume --steps 500
echo "{" >runs/broken/checkpoint/state.json
refuse "not valid JSON" "$programs/train" --run broken --resume

refuse "did you mean loss" "$programs/eval" lss
refuse "did you mean straight" "$programs/eval" loss --run straigt
refuse "fractions 0,3" "$programs/eval" memory --fractions 0,3
refuse "broken" "$programs/eval" loss --run broken
refuse "token|layer" "$programs/eval" trace --run straight --prompt "Ann" --layer 7

# A loss that is not finite stops the run.
$train --run diverge --steps 50 --lr 1e18 --warmup 0 --clip 0 --schedule constant >out 2>message
check "divergence: exit code 2" test $? -eq 2
check "divergence: one line that says how to resume" grep -qE "^error: step [0-9]+: .*(--resume|smaller --lr)" message
check "divergence: the last row of the log" grep -qE "^2,128,nan,.*,nan$" runs/diverge/log.csv
check "divergence: no summary" test ! -e runs/diverge/summary.json
check "replay of the step that diverged" replay diverge 2
check "from the start" grep -q "steps 1 to 2 .*initial weights" replayed
check "gradients that are not finite" grep -qE "^head.weight .* 8448$" replayed

# The last update makes weights that are not finite: no loss shows it but one that is computed with them.
cp -r runs/straight runs/over && sed -i 's/"lr": [0-9.e-]*/"lr": 1e39/; s/"schedule": "cosine"/"schedule": "constant"/' runs/over/checkpoint/state.json
cp -r runs/over/checkpoint before
"$programs/train" --run over --resume --steps 21 --checkpoint-every 1 >out 2>message
check "bad weights: exit code 2" test $? -eq 2
check "bad weights: one line" grep -qE "^error: step 21: .*not good.*step 20: .*--resume" message
check "bad weights: the checkpoint before stays" diff -r before runs/over/checkpoint
check "bad weights: no summary" test ! -e runs/over/summary.json
check "bad weights: val.csv says so" grep -q "^21,1344,nan$" runs/over/val.csv
rm -r before
cp -r runs/straight runs/nan && size=$(wc -c <runs/nan/checkpoint/model.safetensors)
printf '\377\377\377\177' | dd of=runs/nan/checkpoint/model.safetensors bs=1 seek=$((size - 4)) conv=notrunc 2>/dev/null
for command in "eval loss" "eval sample" "eval export --out no" "train --resume --steps 30"; do
  refuse "not finite" "$programs"/$command --run nan
done

# Standard output on a disk that is full.
for command in "train --help" "train --run straight --resume" "eval loss --run straight" "eval memory" "eval --help" "data info data/val_000.bin"; do
  "$programs"/$command >/dev/full 2>message
  check "full output of $command" test $? -eq 2
done

# A disk that is full while saving (here: a limit on the size of files): the old checkpoint stays.
cp -r runs/straight runs/full
cp -r runs/full/checkpoint before
(trap '' XFSZ; ulimit -f 60; exec "$programs/train" --run full --resume --steps 22 --checkpoint-every 1) >out 2>message
check "disk full: exit code 2" test $? -eq 2
check "disk full: one line" grep -qE "^error: .*cannot write: File too large" message
check "disk full: old checkpoint unchanged" diff -r before runs/full/checkpoint

mkdir other && cd other && : >runs
refuse "runs/data.*cannot create" $programs/train --data "../data/train_*.bin" --steps 1
cd ..

echo "commands: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
