"""What makes a model without position (NoPE) unstable, what cures it, and at what price in loss?

    make nope                                           on a GPU, about 6 minutes; QUICK=1: 2 minutes
    make nope-cpu                                       a quarter of an hour on 2 cores
    make nope ARGS="--recipe half"                      at which rate do half the seeds fail: 280 runs of 16 s
    make nope ARGS="--recipe long --seeds 5"            another recipe of those below
    build-python/bin/python scripts/nope.py --help      all of its own flags

Trains {block} x {head size} x {what is rotated} x {learning rate} x {seed}. What stands behind -- goes to `train` as
it is. A run fails if it ends more than 0.1 nats above 100 % rotation at the rate that suits 100 % best, or with inf or
nan. This was fixed before the runs of recipe half. A soft-cap on the attention logits and a clip of the weights that
make them ask whether the logits are the cause: if holding them cures it, they are.

The way to instability that is measured is that of Wortsman et al. 2023 (arXiv 2309.14322): attention logits grow,
the softmax saturates, the loss leaves its course; and a higher learning rate brings it forward.
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
from study import FULL, number

# What is compared: the rotated share (above 1: a number of channels), and what else is different (study.OTHERS).
ARMS = ["0", "0:qk-norm", "0:softcap", "0:clip", "2", "0.1", "1"]

# A recipe: block types, head sizes, learning rates, seeds 1 to `seeds`, steps, width; the rest are flags of `train`.
# There are width / head size heads, so that all arms have the same number of parameters and of operations.
GRID = dict(blocks=["parallel", "sequential"], head_sizes=[32, 128], arms=ARMS, lrs=["3e-3", "1e-2", "3e-2"],
            seeds=2, steps=1000, width=256, train="--layers 6 --context 512 --batch 32 --mlp-hidden 704")
ONE_HEAD_SIZE = GRID | dict(head_sizes=[128], lrs=["3e-3", "1e-2"], seeds=3, steps=3000)
RECIPES = {
    # The shortest run found in which NoPE breaks down with every seed, and neither two channels nor QK-Norm with any.
    "default": GRID | dict(blocks=["parallel"], head_sizes=[32], lrs=["5e-3"], seeds=3,
                           train="--layers 6 --context 2048 --batch 32 --mlp-hidden 704"),
    # The same at rates around it: at which do half the seeds fail?
    "half": GRID | dict(blocks=["parallel"], head_sizes=[32], lrs=["3e-3", "4e-3", "5e-3", "6e-3", "7e-3"], seeds=8,
                        train="--layers 6 --context 2048 --batch 32 --mlp-hidden 704"),
    "grid": GRID,
    "quick": GRID | dict(blocks=["parallel"], head_sizes=[128], lrs=["3e-3", "1e-2"]),
    "cpu": GRID | dict(blocks=["parallel"], head_sizes=[128], lrs=["3e-3", "1e-2"], seeds=1, width=128, steps=1300,
                       train="--layers 4 --context 256 --batch 4 --mlp-hidden 256"),
    # For some 50 MB of text in 4,096 BPE tokens; 82 to 90 s a run on an H100. NoPE spiked with one seed of three.
    "text": GRID | dict(blocks=["parallel"], head_sizes=[128], lrs=["3e-3"], seeds=3, steps=3400,
                        train="--layers 12 --context 2048 --batch 32 --mlp-hidden 704 --init-std 0.02"),
    # In search of loss spikes: each goes one way from the grid.
    "long": ONE_HEAD_SIZE | dict(steps=10000),
    "context": ONE_HEAD_SIZE | dict(train="--layers 6 --context 2048 --batch 8 --mlp-hidden 704"),
    "deep": ONE_HEAD_SIZE | dict(train="--layers 24 --context 512 --batch 32 --mlp-hidden 704"),
    "noclip": ONE_HEAD_SIZE | dict(train=GRID["train"] + " --clip 0"),
    "rates": ONE_HEAD_SIZE | dict(lrs=["1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]),
}

# The primary outcome: a run failed if its loss became inf or nan, or ended this far above 100 %'s mean at the rate that
# is best for 100 %, one bar for all arms and rates of a block and head size.
# A learning rate is unstable for an arm if, with any seed, the loss became inf or nan, or spiked (7 standard deviations
# above its rolling mean), or ended as far above the best that a smaller learning rate of the same arm reached.
TOLERANCE = 0.1  # nats per token

# Flags of `train` that the study sets itself.
OWN = ("run resume steps ranks lanes seed rotary-dim rotary-fraction qk-norm attention-softcap qk-clip block data "
       "width heads head-size lr").split()


def parse(argv):
    own, passed = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def items(text):
        return text.split(",")

    parser.add_argument("--recipe", default="default", help=", ".join(RECIPES))
    parser.add_argument("--name", help="the runs and the report go to runs/NAME (default nope, or nope-RECIPE)")
    parser.add_argument("--data", default="data/stories-20M/train_*.bin", help="training shards (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: what the machine takes (default)")
    parser.add_argument("--gpus-per-run", type=int, default=1, help="GPUs that train a run together (default 1)")
    parser.add_argument("--report", action="store_true", help="only write the report, of the runs that are there")
    changes = parser.add_argument_group("changes of the recipe")
    changes.add_argument("--arms", type=items, metavar="LIST", help="what is rotated, such as 0,0:qk-norm,2,0.1,1")
    changes.add_argument("--blocks", type=items, metavar="LIST", help="sequential, parallel")
    changes.add_argument("--head-sizes", type=items, metavar="LIST", help="channels of a head")
    changes.add_argument("--lrs", type=items, metavar="LIST", help="peak learning rates")
    for flag in ("seeds", "steps", "width"):
        changes.add_argument(f"--{flag}", type=int, metavar="N")
    args = parser.parse_args(own)
    if args.recipe not in RECIPES:
        raise UserError(f"--recipe {args.recipe}: must be one of {', '.join(RECIPES)}")
    args.name = args.name or ("nope" if args.recipe == "default" else f"nope-{args.recipe}")
    recipe = RECIPES[args.recipe] | {key: value for key, value in vars(args).items() if key in GRID and value}
    return args, recipe, runner.joined(passed, OWN)


def jobs_of(args, recipe, passed):
    jobs = []
    for seed, lr, block, head_size, arm in itertools.product(
            range(1, recipe["seeds"] + 1), recipe["lrs"], recipe["blocks"], recipe["head_sizes"], recipe["arms"]):
        heads, rest = divmod(recipe["width"], int(head_size))
        if rest or not heads:
            raise UserError(f"--head-sizes {head_size}: must divide the width of {recipe['width']}")
        flags = [f"--data={args.data}", f"--width={recipe['width']}", f"--heads={heads}", f"--block={block}"]
        flags += runner.joined(shlex.split(recipe["train"])) + passed
        arm_flags, arm_name = study.arm_flags("--arms", arm)
        flags += [f"--lr={lr}", *arm_flags, f"--seed={seed}"]
        name = f"block={block}_hs={head_size}_{arm_name}_lr={lr}_seed={seed}"
        jobs.append(runner.Job(args.name, name, flags, recipe["steps"]))
    return jobs


# ----------------------------------------------------------------------------------------------------------------------
# What the runs say. A group is a block type and head size. An arm is {learning rate: runs by seed}.


def groups_of(runs):
    """{(block, head size): {label: arm}}."""
    groups = {}
    for key in sorted({(run.arm["block"], int(run.arm["hs"])) for run in runs}):
        labels = study.by_rotation([run for run in runs if (run.arm["block"], int(run.arm["hs"])) == key])
        groups[key] = {}
        for label, arm in labels.items():
            lrs = sorted({float(run.arm["lr"]) for run in arm})
            groups[key][label] = {lr: [run for run in arm if float(run.arm["lr"]) == lr] for lr in lrs}
    return groups


def mean_loss(runs):
    return float(np.mean([run.final_loss for run in runs])) if runs else math.nan


def best_lr(arm):
    """The learning rate with the lowest mean loss."""
    return min(arm, key=lambda lr: mean_loss(arm[lr]))


def spiked(run):
    return math.isfinite(study.first_spike(run))


def is_stable(arm, lr):
    best = min(mean_loss(arm[smaller]) for smaller in arm if smaller <= lr)
    return all(run.state == "finished" and not spiked(run) and run.final_loss <= best + TOLERANCE
               for run in arm[lr])


def bar_of(arms):
    """The loss above which a run of this block and head size failed; nan without runs of 100 %."""
    return mean_loss(arms[FULL][best_lr(arms[FULL])]) + TOLERANCE if FULL in arms else math.nan


def failed(run, bar):
    return run.final_loss > bar  # that of a run that diverged is inf


def failures(groups):
    """{label: {learning rate: (runs that failed, runs)}} over several groups, each with its own bar."""
    counts = {}
    for arms in groups.values():
        bar = bar_of(arms)
        for label, arm in arms.items():
            for lr, runs in arm.items():
                count, n = counts.setdefault(label, {}).get(lr, (0, 0))
                counts[label][lr] = count + sum(failed(run, bar) for run in runs), n + len(runs)
    return counts


def sensitivity(arm):
    """LR sensitivity, the mean over the seeds that were run at every learning rate; nan if none was, or at one rate."""
    if len(arm) < 2:
        return math.nan
    by_seed = [{run.seed: run for run in runs} for runs in arm.values()]
    values = []
    for seed in set.intersection(*map(set, by_seed)):
        losses = [runs[seed].final_loss for runs in by_seed]
        values.append(study.lr_sensitivity(losses, by_seed[0][seed].initial_loss))
    return float(np.mean(values)) if values else math.nan


def logit_at_end(runs):
    """Geometric mean over the seeds of the largest logit at the last diagnostics step where it was finite."""
    logits = [kept[-1] for kept in (run.logit[np.isfinite(run.logit) & (run.logit > 0)] for run in runs) if len(kept)]
    return float(np.exp(np.mean(np.log(logits)))) if logits else math.nan


def growth(runs):
    rates = [study.growth_per_1000(run.logit_step, run.logit) for run in runs]
    rates = [rate for rate in rates if not math.isnan(rate)]
    return float(np.mean(rates)) if rates else math.nan


def measure(arm, lr):
    """What is told of an arm. `lr` is the learning rate at which arms are compared, `here` the runs with it."""
    best, here, every = best_lr(arm), arm.get(lr, []), [run for runs in arm.values() for run in runs]
    return dict(
        losses={run.seed: run.final_loss for run in arm[best]},
        loss_by_lr={lr: mean_loss(arm[lr]) for lr in arm}, logit_by_lr={lr: logit_at_end(arm[lr]) for lr in arm},
        sensitivity=sensitivity(arm), stable=study.largest_stable(arm, [is_stable(arm, lr) for lr in arm]),
        growth=growth(here),
        first_spike=min(map(study.first_spike, here), default=math.inf), spiked=sum(map(spiked, here)), here=len(here),
        unstable=sum(spiked(run) or run.state == "diverged" for run in every), runs=len(every))


# ----------------------------------------------------------------------------------------------------------------------
# The report

def summary_header(lrs):
    return ["loss less that of 100 %", "LR sensitivity", "largest stable lr",
            f"largest logit at lr {' / '.join(f'{lr:g}' for lr in lrs)}", "its growth per 1,000 steps",
            "runs that spiked or diverged"]


def price(measured, label, groups):
    """Best loss of an arm less that of full rotation, paired by group and seed: mean, half-width, number."""
    def losses(label):
        return {(group, seed): loss for group in groups if label in measured[group]
                for seed, loss in measured[group][label]["losses"].items()}
    return study.interval_text(study.paired_difference(losses(label), losses(FULL))) if label != FULL else "-"


def lr_text(lr):
    return "none" if math.isnan(lr) else f"{lr:g}"


def by_lr(values, lrs, digits):
    return " / ".join(number(values.get(lr, math.nan), digits) for lr in lrs)


def summary(measured, label, groups, lrs):
    """The columns of summary_header for an arm over several groups."""
    of = [measured[group][label] for group in groups if label in measured[group]]
    stable = [m["stable"] for m in of]
    logits = {lr: np.exp(np.mean([np.log(m["logit_by_lr"].get(lr, math.nan)) for m in of])) for lr in lrs}
    return [price(measured, label, groups), number(np.mean([m["sensitivity"] for m in of]), 3),
            lr_text(math.nan if any(map(math.isnan, stable)) else min(stable)),
            by_lr(logits, lrs, 1), number(np.mean([m["growth"] for m in of]), 2, sign=True),
            f"{sum(m['unstable'] for m in of)} of {sum(m['runs'] for m in of)}"]


def rate_text(rate):
    return "below all" if rate == 0 else "above all" if math.isinf(rate) else f"{rate:.2g}"


def failures_table(counts, lrs):
    """Header and rows, from what failures() gave: how many failed, at which rate half do, and the test against NoPE."""
    nope, against = study.rotation_label(0), {}
    for label, of in counts.items():
        both = [lr for lr in of if lr in counts.get(nope, {})]  # rates at which both were trained
        if label != nope and both:
            against[label] = study.exact_test(*zip(*(of[lr] for lr in both)), *zip(*(counts[nope][lr] for lr in both)))
    corrected = dict(zip(against, study.holm(list(against.values()))))
    rows = []
    for label, of in counts.items():
        point, low, high = map(rate_text, study.half_point(list(of), *zip(*of.values())))
        rows.append([label, *("{} of {}".format(*of[lr]) if lr in of else "-" for lr in lrs),
                     f"{point} ({low} to {high})", f"{corrected[label]:.2g}" if label in corrected else "-"])
    return ["rotated", *(f"failed at {lr:g}" for lr in lrs), "half fail at (95 %)", "p against NoPE"], rows


def plot_failures(ax, counts):
    """The share that failed by learning rate, from what failures() gave, with its exact 95 % interval."""
    for i, (label, of) in enumerate(counts.items()):
        lrs, shares = np.array(list(of)), np.array([count / n for count, n in of.values()])
        ends = np.array([study.share_interval(*seen) for seen in of.values()]).T
        line, marker = study.style(label)
        shift = 1 + 0.01 * (i - len(counts) / 2)  # so that intervals stand beside each other
        ax.errorbar(lrs * shift, shares, np.abs(ends - shares), label=label, markersize=5, elinewidth=0.8,
                    **line | marker)
    ax.axhline(0.5, color="#555555", linewidth=1)
    ax.set(xlabel="peak learning rate", ylabel="share of runs that failed", xscale="log", ylim=(-0.03, 1.03))
    lrs = sorted({lr for of in counts.values() for lr in of})
    ax.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    ax.set_xticks([], minor=True)


def panels(groups, draw):
    """A figure with a panel per group."""
    figure, axes = study.plt.subplots(1, len(groups), figsize=(max(5.5, 3.6 * len(groups)), 4), sharey=True,
                                      squeeze=False)
    for ax, (key, arms) in zip(axes[0], groups.items()):
        draw(ax, key, arms)
        ax.set_title(f"{key[0]}, head size {key[1]}", fontsize=10)
        if ax.get_legend():
            ax.get_legend().remove()
    for ax in axes[0][1:]:
        ax.set_ylabel("")
    axes[0][-1].legend(fontsize=8)
    return figure


def against_lr(ax, arms, value, what, scale="linear"):
    for label, arm in arms.items():
        values = [value(arm[lr]) for lr in arm]
        line, marker = study.style(label)
        ax.plot(list(arm), [v if math.isfinite(v) else math.nan for v in values], label=label, markersize=5,
                **line | marker)
    ax.set(xlabel="peak learning rate", ylabel=what, xscale="log", yscale=scale)
    lrs = sorted({lr for arm in arms.values() for lr in arm})
    ax.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    ax.set_xticks([], minor=True)


def write_runs(directory, runs):
    """runs.csv: a row per run."""
    with open(directory / "runs.csv", "w") as file:
        print("block,head_size,rotate,with,lr,seed,state,steps,final_loss,max_logit,growth_per_1000,first_spike,"
              "spikes", file=file)
        for run in runs:
            arm, spike = run.arm, study.first_spike(run)
            print(arm["block"], arm["hs"], arm["rotate"], study.other_of(run), arm["lr"], run.seed, run.state,
                  len(run.log.get("step", [])), f"{run.final_loss:.6f}", run.logit[-1] if len(run.logit) else "",
                  f"{study.growth_per_1000(run.logit_step, run.logit):.4f}", "" if math.isinf(spike) else int(spike),
                  len(run.spikes.get("step", [])), sep=",", file=file)


def report(name):
    directory = Path("runs", name)
    runs = [run for run in study.read_runs(directory) if run.state != "unfinished"]
    if not runs:
        raise UserError(f"runs/{name}: no finished run there")
    groups = groups_of(runs)
    reference = {key: best_lr(arms.get(FULL) or next(iter(arms.values()))) for key, arms in groups.items()}
    measured = {key: {label: measure(arm, reference[key]) for label, arm in arms.items()}
                for key, arms in groups.items()}
    labels = list(dict.fromkeys(label for arms in groups.values() for label in arms))
    lrs = sorted({float(run.arm["lr"]) for run in runs})
    config = runs[0].config

    write_runs(directory, runs)
    page = study.Report(directory, f"NoPE's instability: {name}")
    page.text(
        f"{config['layers']} layers x {config['width']}, context {config['context']}, {config['steps']:,} steps of "
        f"{config['batch'] * config['accumulate'] * config['context']:,} tokens, clip {config['clip']:g}, on "
        f"{config['data']}, which a run sees {number(runs[0].epochs, 2)} times; {len(runs)} runs. Losses are training "
        "losses, the mean of the last 5 % of the steps.")
    page.heading("Which runs fail?")
    page.text(
        f"A run fails if it became inf or nan, or ended more than {TOLERANCE} nats above the mean of 100 % at the "
        "rate that is best for 100 %. The rate at which half the seeds fail is interpolated between the rates, on a "
        "logarithmic scale; its 95 % interval supposes only that a higher rate makes no fewer fail, and is exact: "
        "it begins at the last rate, going up, whose share of failures has an interval below one half, and ends at "
        "the last, going down, whose share has one above it; rates with fewer than six runs cannot show that. Shares "
        "have exact intervals (Clopper and Pearson). The "
        "last column: the exact test of the failures against those of NoPE, rate by rate where both were trained, "
        "corrected over the arms by Holm's method.")
    judged = {key: arms for key, arms in groups.items() if FULL in arms}
    if len(judged) > 1:
        page.table("failures", *failures_table(failures(judged), lrs))
    for key, arms in judged.items():
        page.text(f"{key[0]} block, head size {key[1]}; the bar is {bar_of(arms):.4f} nats:")
        page.table(f"failures-{key[0]}-{key[1]}", *failures_table(failures({key: arms}), lrs))
    if judged:
        page.figure("failures", panels(judged, lambda ax, key, arms: plot_failures(ax, failures({key: arms}))),
                    "Share of the seeds that failed, with exact 95 % intervals.")
    page.heading("What cures it, and at what price in loss?")
    page.table("cures", ["rotated", *summary_header(lrs)],
               [[label, *summary(measured, label, groups, lrs)] for label in labels])
    page.text(
        "Means over blocks and head sizes. Loss: at each arm's best learning rate, paired by block, head size and "
        "seed, with the 95 % interval of Student's t. LR sensitivity (Wortsman et al. 2023): mean over the learning "
        "rates of the loss, at most the one at the start, less the best. Largest stable learning rate: up to it no "
        f"seed became nan or spiked, and none ended more than {TOLERANCE} nats above the best of the smaller ones; "
        "the smallest of all groups. Largest attention logit: at the end, geometric mean. Its growth: the slope of "
        "its logarithm over the last half, at the learning rate that is best for 100 % rotation in the group. Spike: "
        "a loss more than 7 standard deviations above its rolling mean of 128 steps.")
    page.heading("What makes it unstable?")
    rows = []
    for position, what in ((0, "block"), (1, "head size")):
        for value in sorted({key[position] for key in groups}):
            for label in (labels[0], FULL):
                chosen = [key for key in groups if key[position] == value and label in groups[key]]
                if chosen:
                    rows.append([f"{what} {value}", label, *summary(measured, label, chosen, lrs)])
    page.table("causes", ["where", "rotated", *summary_header(lrs)], rows)
    for key, arms in measured.items():
        page.heading(f"{key[0]} block, head size {key[1]}")
        page.table(
            f"{key[0]}-{key[1]}",
            ["rotated", f"loss at lr {' / '.join(f'{lr:g}' for lr in lrs)}", *summary_header(lrs)[:-1],
             f"seeds that spiked at lr {reference[key]:g}"],
            [[label, by_lr(m["loss_by_lr"], lrs, 4), *summary(measured, label, [key], lrs)[:-1],
              f"{m['spiked']} of {m['here']}" + (f", from step {m['first_spike']:.0f}" if m["spiked"] else "")]
             for label, m in arms.items()])

    def runs_at(arms, lr):
        return {label: arm.get(lr, []) for label, arm in arms.items()}
    page.heading("Plots")
    for file, where, lr_of in (("", "that is best for 100 % rotation", reference.get),
                               ("-highest", f"{max(lrs):g}, the highest", lambda key: max(lrs))):
        page.figure(f"logits{file}", panels(
            groups, lambda ax, key, arms: study.plot_logits(ax, runs_at(arms, lr_of(key)))),
            "Largest attention logit of all layers and heads over the run, a line per seed, at the learning rate "
            f"{where}.")
        page.figure(f"loss{file}", panels(
            groups, lambda ax, key, arms: study.plot_loss_curves(ax, runs_at(arms, lr_of(key)))),
            f"Training loss at the learning rate {where}; band: lowest to highest seed.")
    page.figure("lr-loss", panels(groups, lambda ax, key, arms: against_lr(
        ax, arms, mean_loss, "training loss at the end, nats per token")),
        "Loss at the end by learning rate, mean of the seeds. A point is missing where a seed diverged.")
    page.figure("lr-logit", panels(groups, lambda ax, key, arms: against_lr(
        ax, arms, logit_at_end, "largest |attention logit| at the end", "log")),
        "Largest attention logit at the end by learning rate, geometric mean of the seeds.")
    page.write()


def work():
    args, recipe, passed = parse(sys.argv[1:])
    failed = others = False
    if not args.report:
        failed, others = runner.train_all(jobs_of(args, recipe, passed), args.jobs, args.gpus_per_run)
    if not others:
        report(args.name)
    return 1 if failed else 0


if __name__ == "__main__":
    runner.main(work)
