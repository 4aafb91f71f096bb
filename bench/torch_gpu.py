"""Trains the same model here and in PyTorch on one GPU, bf16, and prints tokens per second side by side.

    make build/bench && python bench/torch_gpu.py                       needs torch and a GPU; about ten minutes
    python bench/torch_gpu.py --shapes "6 x 384" --fractions 0.1        only shapes with these words in their names
    python bench/torch_gpu.py --program "" --modes eager                PyTorch alone, eager alone

A step is zero_grad, forward, loss, backward, clipping, AdamW on random tokens. Ours runs before and after each of
PyTorch's modes, so that a GPU that grows warm slows all of them; a figure is the median of the rounds. PyTorch runs the
model of scripts/reference.py under bf16 autocast with scaled_dot_product_attention and fused AdamW: as it is (eager),
under torch.compile, and under torch.compile with CUDA graphs (mode "reduce-overhead"); the time to compile is not counted.
TFLOP/s counts the matrix products of the linear layers and of causal attention, half of T x T; the peak beside it is
that of a product of two 8192 x 8192 matrices, measured here too.
"""

import argparse
import gc
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
sys.dont_write_bytecode = True
from reference import Config, GPT, make_optimizer  # noqa: E402

# name: batch, context, flags of train
SHAPES = {
    "12 x 768": (64, 1024, "--layers=12 --width=768 --heads=12 --mlp-hidden=2048 --vocab=50304"),
    "llama-1b": (8, 2048, "--layers=16 --width=2048 --heads=32 --kv-heads=8 --mlp-hidden=8192 --vocab=50304"),
    "6 x 384": (64, 256, "--layers=6 --width=384 --heads=6 --mlp-hidden=1024 --vocab=256"),
    "12 x 256": (32, 2048, "--layers=12 --width=256 --heads=2 --mlp-hidden=704 --vocab=4096 --block=parallel"),
}
COMPILE = {"compiled": {}, "graphs": {"mode": "reduce-overhead"}}  # options of torch.compile; not there: eager


def ask(program, batch, context, flags, seconds):
    """Runs build/bench; its line of JSON."""
    command = [program, "--device", "cuda", "--dtype", "bf16", "--shape", "nano", "--batch", batch,
               "--context", context, "--seconds", seconds, "--json", *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def matrix_peak(n=8192, rounds=20):
    """Operations per second of bf16 products of random matrices."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * n**3 / statistics.median(times)


class Trainer:
    """One PyTorch training run; call rate(seconds) to go on with it for that long."""

    def __init__(self, config, batch, context, mode):
        torch.manual_seed(1)
        with torch.device("cuda"):
            self.model = GPT(config)
            self.tokens = torch.randint(config.vocab, (batch, context))
            self.targets = torch.randint(config.vocab, (batch, context))
        self.optimizer = make_optimizer(self.model, 1e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)
        self.graphs = mode == "graphs"
        self.loss = self.model.loss if mode == "eager" else torch.compile(self.model.loss, **COMPILE[mode])
        for _ in range(5):  # compiles, warms up
            self.step()

    def step(self):
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.loss(self.tokens, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()

    def rate(self, seconds):
        """Tokens per second: nothing waits for the GPU but the end of each run of steps."""
        runs, run, begin = [], 1, time.perf_counter()
        while len(runs) < 3 or time.perf_counter() - begin < seconds:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(run):
                self.step()
            torch.cuda.synchronize()
            elapsed = (time.perf_counter() - start) / run
            runs.append(elapsed)
            if run == 1:
                run, runs = max(2, int(0.2 / elapsed)), []
        return self.tokens.numel() / statistics.median(runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="", help="part of the names of the shapes to run")
    parser.add_argument("--fractions", default="0.1,1", help="rotary fractions")
    parser.add_argument("--program", default=str(ROOT / "build" / "bench"))
    parser.add_argument("--modes", default="eager,compiled,graphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="per contestant and round")
    parser.add_argument("--json", help="a file for all rows, with the share of each operation")
    options = parser.parse_args()
    modes = [mode for mode in options.modes.split(",") if mode]
    torch.set_float32_matmul_precision("high")

    peak = matrix_peak()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; large bf16 product: {peak / 1e12:.0f} TFLOP/s")
    print(f"{'shape':<20}{'RoPE':>6}{'':>4}{'tokens/s':>12}{'ours / it':>11}{'TFLOP/s':>9}{'of peak':>9}")
    rows = []
    for name, (batch, context, flags) in SHAPES.items():
        if options.shapes not in name:
            continue
        for fraction in options.fractions.split(","):
            flags_now = [*flags.split(), f"--rotary-fraction={fraction}"]
            line = ask(options.program or ROOT / "build" / "bench", batch, context, flags_now, 0)
            config = Config(**{field: line["config"][field] for field in Config.__dataclass_fields__})
            rates, shares = {"ours": []}, {}

            def ours():
                if options.program:
                    answer = ask(options.program, batch, context, flags_now, options.seconds)
                    rates["ours"].append(answer["tokens_per_second"])
                    shares.update(answer["operation_seconds"])

            ours()
            for mode in modes:  # one model at a time in the GPU's memory: ours before and after each of PyTorch's
                try:
                    trainer = Trainer(config, batch, context, mode)
                    rates[mode] = [trainer.rate(options.seconds) for _ in range(options.rounds)]
                    del trainer
                except Exception as problem:
                    print(f"{name}, {mode}: {str(problem).splitlines()[0]}", file=sys.stderr)
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()
                ours()
            medians = {who: statistics.median(values) for who, values in rates.items() if values}
            for who, rate in medians.items():
                flops = rate * line["flops_per_token"]
                ratio = f"{medians['ours'] / rate:.2f}" if "ours" in medians and who != "ours" else ""
                print(f"{name:<20}{100 * float(fraction):>4.0f} % {who:<9}{rate:>9,.0f}{ratio:>10}{flops / 1e12:>9.0f}"
                      f"{flops / peak:>8.0%}", flush=True)
            total = sum(shares.values())
            for operation, seconds in sorted(shares.items(), key=lambda item: -item[1]):
                print(f"    {operation:<26}{1e3 * seconds:>10.3f} ms{seconds / total:>7.1%}")
            rows.append(dict(shape=name, fraction=float(fraction), batch=batch, context=context, peak_flops=peak,
                             flops_per_token=line["flops_per_token"], tokens_per_second=medians, operations=shares))
            if options.json:
                pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
