"""What makes a model without position (NoPE) unstable, what cures it, and at what price in loss?

  make nope              on a GPU, about 10 minutes; make nope QUICK=1: 2 minutes
  make nope-cpu          how the attention logits grow; 20 minutes on 2 cores
  make nope ARGS="--recipe long --name nope-long"
  build-python/bin/python scripts/nope.py --help

Trains {block} x {head size} x {how much is rotated} x {learning rate} x {seed}: a recipe below. What stands behind -- goes to
`train` as it is. The way from a learning rate to instability follows Wortsman et al. 2023 (arXiv 2309.14322): attention
logits grow, the softmax saturates, the loss leaves its course.
"""
import argparse
import itertools
import math
import shlex
import sys
from pathlib import Path

import numpy as np

import runner
import study
from runner import UserError
from study import number

# What is compared: rotated share (as eval's --fractions: above 1 a number of channels), QK-Norm or not.
ARMS = [("0", False), ("0", True), ("2", False), ("0.1", False), ("1", False)]
NOPE, FULL = study.rotation_label("0"), study.rotation_label("1")

# A recipe: block types, head sizes, learning rates, seeds 1 to `seeds`, steps, and the rest as train's flags. The number of
# heads is width / head size, so the parameters and the arithmetic of all arms are the same.
DEFAULT = dict(blocks=["parallel", "sequential"], head_sizes=[32, 128], arms=ARMS, lrs=["3e-3", "1e-2", "3e-2"], seeds=2,
               steps=1000, width=256, train="--layers 6 --context 512 --batch 32 --mlp-hidden 704")
RECIPES = {
    "default": DEFAULT,
    "quick": DEFAULT | dict(blocks=["parallel"], head_sizes=[128], lrs=["3e-3", "1e-2"]),
    "cpu": DEFAULT | dict(blocks=["parallel"], head_sizes=[128], lrs=["3e-3", "1e-2"], width=128, steps=1000,
                          train="--layers 4 --context 256 --batch 4 --mlp-hidden 256"),
    # 12 layers x 256, 2 heads of 128, context 2048, 65,536 tokens a step: made for 50 MB of text with 4,096 BPE tokens.
    "text": DEFAULT | dict(blocks=["parallel"], head_sizes=[128], lrs=["3e-3"], seeds=3, steps=3400,
                           train="--layers 12 --context 2048 --batch 32 --mlp-hidden 704"),
    # In search of loss spikes, each along one direction away from the default.
    "long": DEFAULT | dict(head_sizes=[128], lrs=["3e-3", "1e-2"], seeds=3, steps=10000),
    "context": DEFAULT | dict(head_sizes=[128], lrs=["3e-3", "1e-2"], seeds=3, steps=3000,
                              train="--layers 6 --context 2048 --batch 8 --mlp-hidden 704"),
    "deep": DEFAULT | dict(head_sizes=[128], lrs=["3e-3", "1e-2"], seeds=3, steps=3000,
                           train="--layers 24 --context 512 --batch 32 --mlp-hidden 704"),
    "noclip": DEFAULT | dict(head_sizes=[128], seeds=3, steps=3000, train=DEFAULT["train"] + " --clip 0"),
    "rates": DEFAULT | dict(head_sizes=[128], lrs=["1e-3", "3e-3", "1e-2", "3e-2", "1e-1"], seeds=3, steps=3000),
}

# A learning rate is unstable for an arm if, for any seed, the loss became inf or nan, or it spiked (more than 7 standard
# deviations above its rolling mean), or the loss at the end is this far above the best that a smaller one reached.
TOLERANCE = 0.1  # nats per token


def parse(argv):
  own, passed = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  items = lambda text: text.split(",")
  parser.add_argument("--recipe", default="default", help=f"one of {', '.join(RECIPES)} (default %(default)s)")
  parser.add_argument("--name", help="the runs and the report go to runs/NAME (default nope, nope-RECIPE)")
  parser.add_argument("--data", default="data/stories-20M/train_*.bin", help="training shards (default %(default)s)")
  for flag, what in (("blocks", "sequential, parallel"), ("head-sizes", "channels of a head"), ("lrs", "peak learning rates")):
    parser.add_argument(f"--{flag}", type=items, metavar="LIST", help=f"{what} (default: the recipe's)")
  for flag in ("seeds", "steps", "width"):
    parser.add_argument(f"--{flag}", type=int, metavar="N", help="(default: the recipe's)")
  parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time; 0: what the machine takes (default)")
  parser.add_argument("--report", action="store_true", help="only write the report, of the runs that are there")
  args = parser.parse_args(own)
  if args.recipe not in RECIPES:
    raise UserError(f"--recipe {args.recipe}: must be one of {', '.join(RECIPES)}")
  args.name = args.name or ("nope" if args.recipe == "default" else f"nope-{args.recipe}")
  recipe = RECIPES[args.recipe] | {key: value for key, value in vars(args).items() if key in DEFAULT and value}
  return args, recipe, runner.joined(passed, "run resume steps seed rotary-dim rotary-fraction qk-norm block data width heads "
                                             "head-size lr".split())


def jobs_of(args, recipe, passed):
  jobs = []
  for seed, lr, block, head_size, (rotate, qk_norm) in itertools.product(
      range(1, recipe["seeds"] + 1), recipe["lrs"], recipe["blocks"], recipe["head_sizes"], recipe["arms"]):
    heads, rest = divmod(recipe["width"], int(head_size))
    if rest or not heads:
      raise UserError(f"--head-sizes {head_size}: must divide the width of {recipe['width']}")
    flags = [f"--data={args.data}", f"--width={recipe['width']}", f"--heads={heads}", f"--block={block}", f"--lr={lr}"]
    flags += runner.joined(shlex.split(recipe["train"])) + passed + ["--qk-norm"] * qk_norm
    flags += [f"--rotary-dim={rotate}" if float(rotate) > 1 else f"--rotary-fraction={rotate}", f"--seed={seed}"]
    name = f"block={block}_hs={head_size}_rotate={rotate}_qknorm={int(qk_norm)}_lr={lr}_seed={seed}"
    jobs.append(runner.Job(args.name, name, flags, recipe["steps"]))
  return jobs


# ----------------------------------------------------------------------------------------------------------------------
# What the runs say. A group is a block type and head size; in it {label: {learning rate: runs by seed}}.


def groups_of(runs):
  groups = {}
  for key in sorted({(run.arm["block"], int(run.arm["hs"])) for run in runs}):
    arms = study.by_rotation([run for run in runs if (run.arm["block"], int(run.arm["hs"])) == key])
    groups[key] = {label: {lr: [run for run in arm if float(run.arm["lr"]) == lr]
                           for lr in sorted({float(run.arm["lr"]) for run in arm})} for label, arm in arms.items()}
  return groups


def mean_loss(runs):
  return float(np.mean([study.final_loss(run) for run in runs])) if runs else math.nan


def best_lr(arm):
  """The learning rate with the lowest mean loss."""
  return min(arm, key=lambda lr: mean_loss(arm[lr]))


def is_stable(arm, lr):
  best = min(mean_loss(arm[smaller]) for smaller in arm if smaller <= lr)
  return all(run.state == "finished" and math.isinf(study.first_spike(run)) and study.final_loss(run) <= best + TOLERANCE
             for run in arm[lr])


def sensitivities(arm):
  """{seed: LR sensitivity}, for the seeds that were run at every learning rate."""
  seeds = set.intersection(*({run.seed for run in runs} for runs in arm.values()))
  of = lambda lr, seed: next(run for run in arm[lr] if run.seed == seed)
  return {seed: study.lr_sensitivity([study.final_loss(of(lr, seed)) for lr in arm],
                                     study.initial_loss(of(min(arm), seed))) for seed in sorted(seeds)}


def logit_at_end(runs):
  """Geometric mean over the seeds of the largest logit at the last diagnostics step, or the last before it was lost."""
  logits = [kept[-1] for kept in (run.logit[np.isfinite(run.logit) & (run.logit > 0)] for run in runs) if len(kept)]
  return float(np.exp(np.mean(np.log(logits)))) if logits else math.nan


def growth(runs):
  rates = [rate for rate in (study.growth_per_1000(run.logit_step, run.logit) for run in runs) if not math.isnan(rate)]
  return float(np.mean(rates)) if rates else math.nan


def measure(arm, lr):
  """What is told of an arm; `lr` is the learning rate at which arms are compared."""
  every, here = [run for runs in arm.values() for run in runs], arm.get(lr, [])
  spikes = [study.first_spike(run) for run in here]
  best = best_lr(arm)
  return dict(best_lr=best, loss=mean_loss(arm[best]), losses={run.seed: study.final_loss(run) for run in arm[best]},
              sensitivity=study.mean_interval(list(sensitivities(arm).values()))[0],
              stable=study.largest_stable(arm, [is_stable(arm, lr) for lr in arm]),
              logit=logit_at_end(here), growth=growth(here), first_spike=min(spikes, default=math.inf),
              spiked=sum(map(math.isfinite, spikes)), here=len(here), loss_here=mean_loss(here),
              unstable=sum(not math.isinf(study.first_spike(run)) or run.state == "diverged" for run in every), runs=len(every))


def write_runs(directory, runs):
  """runs.csv: a row per run, for tables of one's own."""
  with open(directory / "runs.csv", "w") as file:
    print("block,head_size,arm,lr,seed,state,steps,final_loss,max_logit,growth_per_1000,first_spike,spikes", file=file)
    for run in runs:
      spike = study.first_spike(run)
      print(run.arm["block"], run.arm["hs"], study.rotation_label(run.arm["rotate"], run.arm["qknorm"] == "1"), run.arm["lr"], run.seed, run.state,
            len(run.log.get("step", [])), study.final_loss(run), run.logit[-1] if len(run.logit) else "",
            study.growth_per_1000(run.logit_step, run.logit), "" if math.isinf(spike) else int(spike),
            len(run.spikes.get("step", [])), sep=",", file=file)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def difference_to_full(measured, label, groups):
  """Best loss of an arm less that of full rotation, paired by group and seed: mean, half-width, number."""
  values = {(group, seed): loss for group in groups for seed, loss in measured[group].get(label, {"losses": {}})["losses"].items()}
  if label == FULL:
    return math.nan, math.nan, 0
  full = {(group, seed): loss for group in groups for seed, loss in measured[group].get(FULL, {"losses": {}})["losses"].items()}
  return study.paired_difference(values, full)


def summary_row(measured, label, groups):
  """An arm over several groups: means, geometric means where a quantity spans orders of magnitude."""
  of = [measured[group][label] for group in groups if label in measured[group]]
  mean = lambda key: float(np.mean([m[key] for m in of]))
  geometric = lambda key: float(np.exp(np.mean(np.log([m[key] for m in of]))))
  stable = [m["stable"] for m in of]
  return [study.interval_text(difference_to_full(measured, label, groups)), number(mean("sensitivity"), 3),
          "none" if any(map(math.isnan, stable)) else f"{min(stable):g}",
          number(geometric("logit"), 1), number(mean("growth"), 2, sign=True), f"{sum(m['unstable'] for m in of)} of {sum(m['runs'] for m in of)}"]


SUMMARY = ["loss less that of 100 %", "LR sensitivity", "largest stable lr", "largest logit", "its growth per 1,000 steps",
           "runs that spiked or diverged"]


def panels(groups, draw):
  """A figure with a panel per group."""
  figure, axes = study.plt.subplots(1, len(groups), figsize=(max(5.5, 3.6 * len(groups)), 4), sharey=True, squeeze=False)
  for ax, (key, arms) in zip(axes[0], groups.items()):
    draw(ax, key, arms)
    ax.set_title(f"{key[0]}, head size {key[1]}", fontsize=10)
    if ax.get_legend():
      ax.get_legend().remove()
  for ax in axes[0][1:]:
    ax.set_ylabel("")
  axes[0][-1].legend(fontsize=8)
  return figure


def against_lr(arms, ax, value, label):
  for name, arm in arms.items():
    values = [value(arm[lr]) for lr in arm]
    line, dots = study.style(name)
    ax.plot(list(arm), [v if math.isfinite(v) else math.nan for v in values], label=name, **line | dots, markersize=5)
  ax.set_xscale("log")
  ax.set(xlabel="peak learning rate", ylabel=label)


def report(name):
  directory = Path("runs", name)
  runs = [run for run in study.read_runs(name) if run.state != "unfinished"]
  if not runs:
    raise UserError(f"runs/{name}: no finished run there")
  study.use_style()
  groups = groups_of(runs)
  reference = {key: best_lr(arms.get(FULL) or next(iter(arms.values()))) for key, arms in groups.items()}
  measured = {key: {label: measure(arm, reference[key]) for label, arm in arms.items()} for key, arms in groups.items()}
  write_runs(directory, runs)
  config = runs[0].config
  page = study.Report(directory, f"NoPE's instability: {name}")
  page.text(f"{config['layers']} layers x {config['width']}, context {config['context']}, {config['steps']:,} steps of "
            f"{config['batch'] * config['accumulate'] * config['context']:,} tokens, clip {config['clip']:g}, on {config['data']}, which a "
            f"run sees {number(runs[0].epochs, 2)} times; {len(runs)} runs. Losses are training losses, the mean of the last 5 % of the steps.")
  labels = list(dict.fromkeys(label for arms in groups.values() for label in arms))
  page.heading("What cures it, and at what price in loss?")
  page.table("cures", ["rotated"] + SUMMARY, [[label] + summary_row(measured, label, [g for g in groups if label in groups[g]])
                                              for label in labels])
  page.text("Means over blocks and head sizes. Loss: at each arm's best learning rate, paired by block, head size and seed, with the 95 % interval of "
            "Student's t. LR sensitivity (Wortsman et al. 2023): mean over the learning rates of the loss, at most the one at the start, less the "
            f"best. Largest stable learning rate: no seed became nan or spiked, or ended more than {TOLERANCE} nats above the best of the smaller "
            "ones; the smallest of all groups. Largest logit (at the end; geometric mean) and its growth (slope of its logarithm over the last half) "
            "are those at the learning rate that is best for 100 % rotation. Spike: a loss more than 7 standard deviations above its rolling mean of 128 steps.")
  page.heading("What makes it unstable?")
  rows = []
  for position, names in ((0, ["block"]), (1, ["head size"])):
    for value in sorted({key[position] for key in groups}):
      for label in (NOPE, FULL):
        chosen = [key for key in groups if key[position] == value and label in groups[key]]
        if chosen:
          rows.append([f"{names[0]} {value}", label] + summary_row(measured, label, chosen))
  page.table("causes", ["where", "rotated"] + SUMMARY, rows)
  for key, arms in groups.items():
    page.heading(f"{key[0]} block, head size {key[1]}")
    rows = []
    for label, m in measured[key].items():
      rows.append([label, number(m["loss"]), f"{m['best_lr']:g}", study.interval_text(difference_to_full(measured, label, [key])), number(m["sensitivity"], 3),
                   "none" if math.isnan(m["stable"]) else f"{m['stable']:g}", number(m["loss_here"]), number(m["logit"], 1), number(m["growth"], 2, sign=True),
                   f"{m['spiked']} of {m['here']}" + (f", from step {m['first_spike']:.0f}" if m["spiked"] else "")])
    at = f"at lr {reference[key]:g}: "
    page.table(f"{key[0]}-{key[1]}", ["rotated", "best loss", "at lr", "less that of 100 %", "LR sensitivity", "largest stable lr", at + "loss",
                                      "largest logit", "growth per 1,000 steps", "seeds that spiked"], rows)
  here = lambda key, arms: {label: arm.get(reference[key], []) for label, arm in arms.items()}
  page.heading("Plots")
  page.figure("logits", panels(groups, lambda ax, key, arms: study.plot_logits(ax, here(key, arms))),
              "Largest attention logit of all layers and heads over the run, a line per seed, at the learning rate that is best for 100 %.")
  page.figure("loss", panels(groups, lambda ax, key, arms: study.plot_loss_curves(ax, here(key, arms))),
              "Training loss at the same learning rate; band: lowest to highest seed.")
  page.figure("lr-loss", panels(groups, lambda ax, key, arms: against_lr(arms, ax, mean_loss, "training loss at the end, nats per token")),
              "Loss at the end by learning rate, mean of the seeds; a point is missing where a seed diverged.")
  def lr_logit(ax, key, arms):
    against_lr(arms, ax, logit_at_end, "largest |attention logit| at the end")
    ax.set_yscale("log")
  page.figure("lr-logit", panels(groups, lr_logit), "Largest attention logit at the end by learning rate, geometric mean of the seeds.")
  page.write()


def work():
  args, recipe, passed = parse(sys.argv[1:])
  failed = []
  if not args.report:
    failed = runner.train_all(jobs_of(args, recipe, passed), args.jobs)
  report(args.name)
  return 1 if failed else 0


if __name__ == "__main__":
  runner.main(work)
