"""Trains the same model here and in PyTorch, fp32, same threads, and prints tokens per second side by side.

    make build/bench && python bench/torch_cpu.py                  needs torch; some minutes
    python bench/torch_cpu.py --shapes nano:16x256 --rounds 5      PRESET:BATCHxCONTEXT, comma separated
    python bench/torch_cpu.py --program "" --no-compile            PyTorch alone, eager alone

A step is zero_grad, forward, loss, backward, clipping, AdamW on random tokens. The contestants take turns, round after
round, so that a machine that slows down slows all of them; a figure is the median of the rounds' medians. PyTorch runs
the model of scripts/reference.py (scaled_dot_product_attention, rms_norm, fused AdamW) as it is and under
torch.compile, which needs a C++ compiler; the time to compile is not counted.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
sys.dont_write_bytecode = True
from reference import Config, GPT, make_optimizer, parameter_count  # noqa: E402

SHAPES = "nano:16x256,nano:4x1024,small:16x256,small:4x1024,gpt-124m:4x128,gpt-124m:1x1024"


def ask(program, preset, batch, context, threads, seconds):
    """Runs build/bench; its line of JSON."""
    command = [program, "--shape", preset, "--batch", batch, "--context", context, "--threads", threads,
               "--seconds", seconds, "--json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return json.loads(done.stdout.replace("NaN", "null").replace("nan", "null"))


class Trainer:
    """One PyTorch training run; call rate(seconds) to go on with it for that long."""

    def __init__(self, config, batch, context, compiled):
        torch.manual_seed(1)
        self.model = GPT(config)
        self.optimizer = make_optimizer(self.model, 1e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)
        self.loss = torch.compile(self.model.loss) if compiled else self.model.loss
        self.tokens = torch.randint(config.vocab, (batch, context))
        self.targets = torch.randint(config.vocab, (batch, context))
        for _ in range(2):  # compiles, warms up
            self.step()

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.tokens, self.targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def rate(self, seconds):
        times, begin = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return self.tokens.numel() / statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--program", default=str(ROOT / "build" / "bench"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="per contestant and round")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="also print the rows as one line of JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"PyTorch {torch.__version__}, {options.threads} threads, fp32; tokens per second of a training step")
    print(f"{'shape':<10} {'batch':>5} {'context':>7} {'parameters':>11} {'ours':>9} {'eager':>9} {'compiled':>9}"
          f" {'ours/eager':>10} {'ours/compiled':>13}")
    rows = []
    for shape in options.shapes.split(","):
        preset, sizes = shape.split(":")
        batch, context = map(int, sizes.split("x"))
        program = options.program or str(ROOT / "build" / "bench")
        config = ask(program, preset, batch, context, options.threads, 0)["config"]
        config = Config(**{field: config[field] for field in Config.__dataclass_fields__})
        trainers = {"eager": Trainer(config, batch, context, False)}
        parameters = parameter_count(trainers["eager"].model)
        if not options.no_compile:
            try:
                trainers["compiled"] = Trainer(config, batch, context, True)
            except Exception as problem:  # no compiler, or one that it cannot use
                print(f"torch.compile: {str(problem).splitlines()[0]}", file=sys.stderr)
        rates = {name: [] for name in ("ours", "eager", "compiled")}
        for _ in range(options.rounds):
            if options.program:
                line = ask(program, preset, batch, context, options.threads, options.seconds)
                rates["ours"].append(line["tokens_per_second"])
            for name, trainer in trainers.items():
                rates[name].append(trainer.rate(options.seconds))
        row = {name: statistics.median(values) if values else float("nan") for name, values in rates.items()}
        ours, eager, compiled = row["ours"], row["eager"], row["compiled"]
        print(f"{preset:<10} {batch:>5} {context:>7} {parameters:>11,} {ours:>9.0f} {eager:>9.0f} {compiled:>9.0f}"
              f" {ours / eager:>10.2f} {ours / compiled:>13.2f}", flush=True)
        rows.append(dict(shape=preset, batch=batch, context=context, **row))
        torch._dynamo.reset()
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
