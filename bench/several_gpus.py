"""Trains on 1, 2, 4, ... GPUs of this host, beside PyTorch's DistributedDataParallel, and tests what is promised of it.

    make all && python bench/several_gpus.py                       needs torch and two GPUs; six minutes
    python bench/several_gpus.py --parts small,bits --gpus 1,2     only these parts, on these numbers of GPUs
    python bench/several_gpus.py --parts 8b --gpus 4               the 8B model, which needs four large GPUs

small  tokens/s of 12 x 768, B 64, T 1024, 2 micro-batches for each GPU
ddp    the same model in PyTorch: torch.compile, fused AdamW, gradients exchanged in the last micro-batch only
large  tokens/s of llama-1b, B 8, T 2048, 8 micro-batches for each GPU
bits   a small model of 4 lanes, 200 steps on each number of GPUs: checkpoints are compared byte by byte; resume on
       other numbers of GPUs; replay of a step on one GPU
kills  what becomes of all ranks when one is killed at a random moment, and when the whole is told to stop
8b     tokens/s and memory of llama-8b, beside what `eval memory` says

A speed is the median over the steps of log.csv; the runs are killed once they have made enough of them. Each part goes
on when another fails, and what was measured comes last, as a table. The time to compile is not counted.
"""

import argparse
import contextlib
import csv
import glob
import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = dict(layers=12, width=768, heads=12, kv_heads=12, head_size=64, mlp_hidden=2048, context=1024, vocab=50304)
SMALL_BATCH, SMALL_MICRO = 64, 2
# The vocabulary is that of a large model, so that the head takes the way that it takes there.
BITS = ("--layers=6 --width=384 --heads=6 --mlp-hidden=1024 --context=256 --batch=16 --accumulate=4 --lanes=4 "
        "--val-every=100 --val-tokens=32768 --diagnostics-every=50 --vocab=50304").split()
SMALLER = ("--layers=2 --width=64 --heads=2 --mlp-hidden=128 --context=64 --batch=2 --val-tokens=2048 "
           "--vocab=257").split()  # on a CPU
CHECKPOINT = "model.safetensors", "optimizer.safetensors"


def nccl():
    """PyTorch's NCCL, where the loader finds none."""
    for package in "nvidia.nccl", "nvidia":
        with contextlib.suppress(ImportError):
            spec = importlib.util.find_spec(package)
            for folder in spec.submodule_search_locations if spec else []:
                for found in glob.glob(f"{folder}/**/libnccl.so.2", recursive=True):
                    return found
    return None


def nvidia_smi(what):
    """A value of each GPU of the host; nothing without one."""
    try:
        command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []


def torchrun(ranks):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1",
            "--master-port=29512"]


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    """The processes that it started, in this order."""
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = pathlib.Path(stat).read_text()
            if int(text[text.rfind(")") + 4:].split()[0]) == pid:
                found.append(int(text.split()[0]))
    return sorted(found)


class Bench:
    def __init__(self, options):
        self.build, self.device = pathlib.Path(options.build).resolve(), options.device
        self.bits_flags = BITS + SMALLER * (self.device == "cpu")
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="several-gpus-"))
        self.environment = dict(os.environ, OMP_WAIT_POLICY="passive")
        found = nccl()
        if found and "PARTIAL_ROPE_NCCL" not in os.environ:
            self.environment["PARTIAL_ROPE_NCCL"] = found
        self.rows, self.tests, self.until = [], [], time.time() + options.seconds
        self.run([self.build / "data", "stories", "--out", "data", "--bytes", "8M"], 60)

    def start(self, command, gpus=None):
        environment = dict(self.environment, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}))
        output = tempfile.TemporaryFile("w+")
        process = subprocess.Popen([str(word) for word in command], cwd=self.work, env=environment, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        process.output = output
        return process

    def end(self, process, limit):
        """Waits at most `limit` seconds, then kills. (exit code, what it printed)"""
        try:
            code = process.wait(max(1, limit))
        except subprocess.TimeoutExpired:
            code = 124
        ranks = children(process.pid)  # none if it has ended by itself
        for kill, pid in [(os.killpg, process.pid), *((os.kill, rank) for rank in ranks)]:
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        process.wait()
        until = time.time() + 15
        while any(map(alive, ranks)) and time.time() < until:  # their GPUs are wanted
            time.sleep(0.05)
        process.output.seek(0)
        return code, process.output.read().strip()

    def run(self, command, limit, gpus=None):
        """A program to its end; what it printed."""
        code, text = self.end(self.start(command, gpus), limit)
        if code:
            raise RuntimeError(f"exit code {code}: {' '.join(map(str, command))}\n    " + text[-600:])
        return text

    def log(self, run):
        """The whole rows of a run's log.csv."""
        try:
            text = (self.work / "runs" / run / "log.csv").read_text()
        except OSError:
            return []
        return list(csv.DictReader(text[:text.rfind("\n") + 1].splitlines()))

    def train(self, run, gpus, *flags):
        return [self.build / "train", "--run", run, "--ranks", gpus, "--data", "data/train_*.bin",
                f"--device={self.device}", *flags]

    def wait_for_rows(self, process, run, count, limit):
        until = time.time() + limit
        while len(self.log(run)) < count:
            if process.poll() is not None or time.time() > until:
                code, text = self.end(process, 1)
                raise RuntimeError(f"{run}: {len(self.log(run))} of {count} steps, exit code {code}\n    {text[-600:]}")
            time.sleep(0.05)

    def speed(self, run, gpus, steps, limit, *flags):
        """tokens/s over `steps` steps behind the first four, and the most memory in use on a GPU, in bytes."""
        shutil.rmtree(self.work / "runs" / run, ignore_errors=True)
        process = self.start(self.train(run, gpus, "--dtype=bf16", "--steps=1000000", "--checkpoint-every=1000000",
                                        "--val-every=1000000", *flags))
        self.wait_for_rows(process, run, 4 + steps, limit)
        used = nvidia_smi("memory.used")
        rates = [float(row["tokens_per_second"]) for row in self.log(run)[4:]]
        self.end(process, 0)  # killed: there is nothing to be saved
        shutil.rmtree(self.work / "runs" / run, ignore_errors=True)
        return statistics.median(rates), max(int(mebibytes) << 20 for mebibytes in used)

    def check(self, name, good, note=""):
        self.tests.append((name, bool(good), note))
        print(f"{'ok    ' if good else 'FAILED'} {name} {note}", flush=True)

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def small(self, counts):
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()] + [f"--batch={SMALL_BATCH}"]
        for n in counts:
            rate, _ = self.speed("small", n, 25, 60, *flags, f"--accumulate={SMALL_MICRO * n}")
            self.row("12 x 768", "ours", n, rate)

    def large(self, counts):
        for n in counts:
            rate, _ = self.speed("large", n, 5, 100, "--preset=llama-1b", f"--accumulate={8 * n}")
            self.row("llama-1b", "ours", n, rate)

    def ddp(self, counts):
        for n in counts:
            text = self.run([*torchrun(n), pathlib.Path(__file__).resolve(), "--worker"], 150)
            line = [line for line in text.splitlines() if line.startswith("{")][-1]
            self.row("12 x 768", "DDP", n, json.loads(line)["tokens_per_second"])

    def row(self, model, who, gpus, rate):
        self.rows.append((model, who, gpus, rate))
        print(f"{model}, {who}, {gpus} GPUs: {rate:,.0f} tokens/s", flush=True)

    def bits(self, counts):
        steady = [*self.bits_flags, "--schedule=constant", "--warmup=0"]
        whole = {}
        for n in counts:
            self.run(self.train(f"bits{n}", n, *steady, "--steps=200", "--checkpoint-every=200"), 60)
            whole[n] = self.fingerprint(f"bits{n}")
        for n in counts[1:]:
            same = [name for name in whole[n] if whole[n][name] == whole[counts[0]][name]]
            self.check(f"200 steps: {n} GPUs as {counts[0]}", len(same) == len(whole[n]), f"same: {' '.join(same)}")
        most = counts[-1]
        path = [most, 1, max(1, most // 2)]  # the numbers of GPUs, one after the other
        command = self.train("moved", most, *steady)
        for at, n in zip((70, 140, 200), path):
            self.run([*command, f"--steps={at}", "--checkpoint-every=1000", "--ranks", n], 60)
            command = [self.build / "train", "--run=moved", "--resume"]
        moved = self.fingerprint("moved")
        self.check(f"resumed on {path[0]}, {path[1]}, {path[2]} GPUs", all(
            moved[name] == whole[counts[0]][name] for name in CHECKPOINT))
        text = self.run([self.build / "train", f"--run=bits{most}", "--replay-step=150"], 60)
        self.check(f"a step of {most} GPUs repeated on one", "are those of the run's log.csv" in text)

    def fingerprint(self, run):
        """What must not differ: checkpoint, losses and norms of all steps, validation, diagnostics."""
        directory = self.work / "runs" / run
        found = {name: (directory / "checkpoint" / name).read_bytes() for name in CHECKPOINT}
        found["log.csv"] = [(row["step"], row["loss"], row["grad_norm"], row["log_z"]) for row in self.log(run)]
        for name in "val.csv", "layers.csv", "tensors.csv":
            found[name] = (directory / name).read_bytes()
        return found

    def kills(self, counts):
        n = counts[-1]
        if n < 2:
            return
        command = self.train("killed", n, *self.bits_flags, "--steps=100000", "--checkpoint-every=50")
        for i in range(4):
            process = self.start(command)
            self.wait_for_rows(process, "killed", len(self.log("killed")) + 1 if i else 60, 60)
            time.sleep(random.uniform(0, 1.5))
            ranks = children(process.pid)
            victim = i % n
            os.kill(ranks[victim], signal.SIGKILL)
            begin = time.time()
            code, text = self.end(process, 15)
            took = time.time() - begin
            line = text.splitlines()[-1] if text else ""
            left = [pid for pid in ranks if alive(pid)]
            self.check(f"rank {victim} killed", code == 1 and took < 10 and not left and f"rank {victim} on" in line,
                       f"after {took:.1f} s, exit code {code}: {line}")
            command = [self.build / "train", "--run=killed", "--resume", "--ranks", n]
        process = self.start(command)
        self.wait_for_rows(process, "killed", len(self.log("killed")) + 1, 60)
        process.send_signal(signal.SIGTERM)
        code, text = self.end(process, 30)
        self.check("SIGTERM saves once and ends", code == 143 and text.count("Interrupted: saved at step") == 1)
        if self.device == "cpu":
            return
        text = self.run([*torchrun(n), "--no-python", *self.train("torchrun", 1, *self.bits_flags, "--steps=20")], 60)
        self.check("started by torchrun", text.count("step 20/20") == 1)
        same_gpu = f"LOCAL_RANK=0 {self.build}/train --run=shared --accumulate=4 --device=cuda --data='data/train_*.bin'"
        both = self.start(["env", "WORLD_SIZE=2", "MASTER_PORT=29511", "sh", "-c",
                           f"RANK=0 {same_gpu} & RANK=1 {same_gpu}; wait"])
        text = self.end(both, 30)[1]
        self.check("two ranks on one GPU", "would share a GPU" in text, text[-200:].replace("\n", " | "))
        command = ["env", "PARTIAL_ROPE_NCCL=nowhere.so", *self.train("none", 2, *self.bits_flags)]
        code, text = self.end(self.start(command), 30)
        self.check("no libnccl: one line", code == 2 and text.count("\n") == 0 and "NCCL" in text, text[-300:])

    def memory_8b(self, counts):
        n = counts[-1]
        told = self.run([self.build / "eval", "memory", "--preset=llama-8b", "--dtype=bf16", "--ranks", n], 60)
        total = next(line for line in told.splitlines() if line.split()[:1] == ["total"])
        expected = int(total.split(" bytes")[0].split()[-1].replace(",", ""))
        rate, used = self.speed("8b", n, 4, 240, "--preset=llama-8b", f"--accumulate={2 * n}")
        self.row("llama-8b", "ours", n, rate)
        self.check("llama-8b: memory within 5 % of what eval memory says", abs(used / expected - 1) <= 0.05,
                   f"{used / 2**30:.1f} GiB in use, {expected / 2**30:.1f} said")

    def table(self):
        print(f"\n{'model':<10}{'':<6}{'GPUs':>5}{'tokens/s':>13}{'times one GPU':>15}{'ours / DDP':>12}")
        of = {row[:3]: row[3] for row in self.rows}
        for (model, who, n), rate in of.items():
            one, other = of.get((model, who, 1)), of.get((model, "DDP", n))
            print(f"{model:<10}{who:<6}{n:>5}{rate:>13,.0f}{f'{rate / one:.3f}' if one else '':>15}"
                  f"{f'{rate / other:.2f}' if other and who == 'ours' else '':>12}")
        for name, good, _ in self.tests:
            print(f"{'ok    ' if good else 'FAILED'} {name}")


def worker():
    """One rank of PyTorch's run, under torchrun: rank 0 prints a line of JSON."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, str(ROOT / "scripts"))
    sys.dont_write_bytecode = True
    from reference import Config, GPT, make_optimizer

    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)

    class Loss(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens, targets):
            return self.model.loss(tokens, targets) / SMALL_MICRO

    with device:
        model = GPT(Config(**SMALL, rotary_dim=6))
        tokens, targets = (torch.randint(SMALL["vocab"], (SMALL_BATCH, SMALL["context"])) for _ in range(2))
    optimizer = make_optimizer(model, 1e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)
    loss = torch.compile(Loss(model))
    if size > 1:
        loss = DistributedDataParallel(loss, device_ids=[rank], gradient_as_bucket_view=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for micro in range(SMALL_MICRO):
            quiet = size > 1 and micro + 1 < SMALL_MICRO
            with loss.no_sync() if quiet else contextlib.nullcontext():
                with torch.autocast("cuda", torch.bfloat16):
                    value = loss(tokens, targets)
                value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    for _ in range(6):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    if rank == 0:
        tokens_of_a_step = size * SMALL_MICRO * SMALL_BATCH * SMALL["context"]
        print("\n" + json.dumps(dict(tokens_per_second=tokens_of_a_step / statistics.median(times))), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="small,bits,kills,ddp,large", help="small,bits,ddp,large,kills,8b")
    parser.add_argument("--gpus", help="numbers of GPUs, ascending; default: 1, 2, 4, ... as many as there are")
    parser.add_argument("--build", default=str(ROOT / "build"))
    parser.add_argument("--device", default="cuda", help="cpu: to try out bits and kills without a GPU; needs --gpus")
    parser.add_argument("--seconds", type=float, default=400, help="no part begins after so many")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker()
    gpus = nvidia_smi("name")
    counts = [2**i for i in range(10) if 2**i <= len(gpus)]
    if options.gpus:
        counts = [int(n) for n in options.gpus.split(",")]
    print(f"{len(gpus)} GPUs: {', '.join(sorted(set(gpus)))}; NCCL: {nccl() or 'where the loader finds it'}", flush=True)
    bench = Bench(options)
    parts = {"small": bench.small, "bits": bench.bits, "kills": bench.kills, "ddp": bench.ddp, "large": bench.large,
             "8b": bench.memory_8b}
    try:
        for part in options.parts.split(","):
            begin = time.time()
            if begin > bench.until:
                bench.check(part, False, "not begun: no time left")
                continue
            try:
                parts[part](counts)
            except Exception as problem:  # the next part may still tell something
                bench.check(part, False, str(problem))
            print(f"       {part}: {time.time() - begin:.0f} s", flush=True)
    finally:
        bench.table()
        shutil.rmtree(bench.work, ignore_errors=True)


if __name__ == "__main__":
    main()
