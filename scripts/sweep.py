"""How much rotation does a model need? Trains it with several rotary fractions and seeds, and writes a report.

    make sweep                                          on GPUs: a ladder of learning rates, then new seeds at the best
    make sweep-cpu                                      on 2 cores, smaller, at one learning rate
    make sweep ARGS="--name wiki --data 'data/wiki/train_*.bin' --context 512,2048"
    build-python/bin/python scripts/sweep.py --help     all of its own flags

With --lrs each arm is trained at every rate with seeds 1 to --seeds, the ladder; then --confirm seeds from 101 on at
the rate that was best for that arm. Only these are compared: seeds that chose a rate say nothing about it. Two arms
count as equivalent if two one-sided tests say that their means differ by less than study.MARGIN, which was fixed
before any of these runs was made.

An arm is a share of the head, or above 1 a number of channels, and what else is different behind a colon:
0:qk-norm, 0.1:head (the frequencies of the whole head), 1:nope4 (every 4th layer without rotation). What stands behind
-- goes to `train` as it is: -- --layers 12 --width 512. The paper's other axes take lists, and each combination gets a
section of the report: --preset (size), --context, --data, --block, and --steps, whose runs are schedules of their own.
"""
import argparse
import itertools
import math
import re
import sys
import time
from pathlib import Path

import numpy as np

import runner
import study
from runner import UserError
from study import number

# Flags of `train` that a sweep sets itself.
OWN = "run resume steps ranks lanes seed rotary-dim rotary-fraction preset context block data lr".split()
AXES = "preset", "steps", "context", "block", "data"
FIRST_CONFIRMING_SEED = 101


def parse(argv):
    own, passed = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def add(flag, default, what, kind=int):
        parser.add_argument(f"--{flag}", type=kind, default=default, help=what,
                            metavar="N" if kind is int else "NAME" if kind is str else "LIST")

    def items(text):
        return text.split(",")

    add("name", "sweep", "the runs and the report go to runs/NAME (default sweep)", str)
    add("fractions", items("0,2,0.1,0.25,0.5,0.75,1"),
        "shares of the head, up to 1; above 1 numbers of channels (default 0,2,0.1,0.25,0.5,0.75,1)", items)
    add("lrs", None, "peak learning rates: first a ladder of them", items)
    add("seeds", 3, "seeds 1 to N (default 3); 0 with one of --lrs: no ladder, it is the best rate of another study")
    add("confirm", 8, "with --lrs: new seeds at each arm's best rate (default 8)")
    add("steps", ["1000"], "steps of a run (default 1000); of several, each warms up over a tenth", items)
    add("preset", None, "presets of train", items)
    add("context", None, "positions in a window", items)
    add("block", None, "sequential, parallel", items)
    add("data", None, "patterns of training shards", items)
    add("step-tokens", None, "tokens of a step: sets train's --batch by the context")
    add("positions", 2**18, "tokens for the loss by position (default 262144)")
    add("jobs", 0, "runs at a time; 0: what the machine takes (default)")
    add("gpus-per-run", 1, "GPUs that train a run together (default 1)")
    parser.add_argument("--report", action="store_true", help="only write the report, of the runs that are there")
    return parser.parse_args(own), runner.joined(passed, OWN)


def settings_of(args):
    """Every combination of the axes, as the first part of its runs' names and its flags of `train`. An axis of one
    value is in no name."""
    if args.context and len(args.context) > 1 and not args.step_tokens:
        raise UserError("--context: several contexts need --step-tokens, or steps would differ in tokens")
    if args.step_tokens and not args.context:
        raise UserError("--step-tokens: needs --context as well")
    if not all(steps.isdigit() and int(steps) for steps in args.steps):
        raise UserError(f"--steps {','.join(args.steps)}: must be numbers of steps, at least 1")
    axes = [[(axis, value) for value in getattr(args, axis) or [""]] for axis in AXES]
    for choice in itertools.product(*axes):
        flags = [f"--{axis}={value}" for axis, value in choice if value and axis != "steps"]
        context, steps = dict(choice)["context"], int(dict(choice)["steps"])
        if len(args.steps) > 1:
            flags.append(f"--warmup={steps // 10}")
        if args.step_tokens:
            if not context.isdigit() or not int(context) or args.step_tokens % int(context):
                raise UserError(f"--context {context}: must divide the --step-tokens of {args.step_tokens}")
            flags.append(f"--batch={args.step_tokens // int(context)}")
        name = ""
        for axis, value in choice:
            if len(getattr(args, axis) or []) > 1:
                name += f"{axis}={Path(value).parent.name.replace('_', '-') if axis == 'data' else value}_"
        yield name, flags, steps


def jobs_of(args, passed, rates_of, seeds):
    """A job for each setting, arm, rate and seed; rates_of(setting, arm) gives the arm's rates, "" for train's own."""
    settings = list(settings_of(args))
    if len({name for name, _, _ in settings}) < len(settings):
        raise UserError("--data: the data sets must lie in directories of different names")
    jobs = []
    for seed, (setting, flags, steps), arm in itertools.product(seeds, settings, args.fractions):
        own, arm_name = study.arm_flags("--fractions", arm)
        for lr in rates_of(setting, arm):
            name = f"{setting}{arm_name}" + f"_lr={lr}" * bool(lr) + f"_seed={seed}"
            rate = [f"--lr={lr}"] * bool(lr)
            jobs.append(runner.Job(args.name, name, flags + passed + own + rate + [f"--seed={seed}"], steps,
                                   args.positions))
    return jobs


def confirms(run):
    return run.seed >= FIRST_CONFIRMING_SEED


def setting_of(run):
    return run.name.partition("rotate=")[0]


def ladder_of(runs):
    """{rate as text: mean validation loss of the ladder's seeds}, inf where one of them diverged."""
    losses = {}
    for run in runs:
        if "lr" in run.arm and not confirms(run) and run.state != "unfinished":
            losses.setdefault(run.arm["lr"], []).append(
                run.summary["val_loss"] if run.state == "finished" else math.inf)
    return {lr: float(np.mean(losses[lr])) for lr in sorted(losses, key=float)}


def train(args, passed):
    """As runner.train_all: the jobs that failed, and whether other processes are still at some."""
    def train_all(jobs):
        return runner.train_all(jobs, args.jobs, args.gpus_per_run) if jobs else ([], False)

    if not args.lrs:
        return train_all(jobs_of(args, passed, lambda *_: [""], range(1, args.seeds + 1)))
    ladder = jobs_of(args, passed, lambda *_: args.lrs, range(1, args.seeds + 1))
    failed, others = train_all(ladder)
    while others:  # rates are chosen once all of the ladder is there
        time.sleep(10)
        failed, others = train_all(ladder)
    runs = study.read_runs(Path("runs", args.name))

    def best(setting, arm):
        rotate, _, other = arm.partition(":")
        losses = ladder_of([run for run in runs if setting_of(run) == setting and run.arm["rotate"] == rotate and
                            run.arm.get("with", "") == other])
        return [min(losses, key=losses.get)] if losses else args.lrs if len(args.lrs) == 1 else []

    seeds = range(FIRST_CONFIRMING_SEED, FIRST_CONFIRMING_SEED + args.confirm)
    more_failed, others = train_all(jobs_of(args, passed, best, seeds))
    return failed + more_failed, others


# ----------------------------------------------------------------------------------------------------------------------
# The report. A setting is a combination of the axes; in it {label of a rotation: runs by seed}.

HEADER = ["rotated", "channels", "seeds", "validation loss ± sd", "less that of 100 % ± 95 % CI", "training loss, end",
          "largest logit, end", "ever", "spike score 128 / 1,000, %", "RoPE table, bytes", "RoPE, ms/step", "tokens/s"]


def row(label, runs, groups, speeds):
    finished = [run for run in runs if run.state == "finished"]
    diverged = sum(run.state == "diverged" for run in runs)

    def of(summarise, key):
        values = [run.summary[key] for run in finished if key in run.summary]
        return float(summarise(values)) if values else math.nan

    losses = [run.summary["val_loss"] for run in finished]
    spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    tokens, rope = next((speeds[run.directory] for run in runs if run.directory in speeds), (math.nan, math.nan))
    config = runs[0].config
    return [label, f"{config['rotary_dim']} of {config['head_size']}",
            f"{len(finished)}" + (f" ({diverged} diverged)" if diverged else ""),
            number(of(np.mean, "val_loss")) + spread,
            "-" if label == study.FULL else study.interval_text(study.difference(groups, label)),
            number(float(np.mean([run.final_loss for run in finished])) if finished else math.nan),
            number(of(max, "max_logit"), 1), number(of(max, "max_logit_ever"), 1),
            number(100 * of(np.mean, "spike_score_128"), 2) + " / " + number(100 * of(np.mean, "spike_score_1000"), 2),
            number(of(max, "rope_table_bytes"), 0), number(1e3 * rope, 3), number(tokens, 0)]


FIGURES = [
    ("loss", study.plot_loss_curves, study.plot_loss_curve_difference,
     "Left: training loss, mean of the seeds and the band from the lowest to the highest. Right: the means less that "
     "of 100 %."),
    ("fraction", study.plot_loss_by_fraction, study.plot_difference,
     "Left: validation loss at the end, a mark per seed, the line through the means. Right: difference to 100 %, "
     "paired by seed, with its 95 % interval."),
    ("logits", study.plot_logits, study.plot_gradient_norms,
     "Left: largest attention logit of all layers and heads. Right: norm of the gradient. A line per seed."),
    ("positions", study.plot_loss_by_position,
     lambda ax, groups: study.plot_loss_by_position(ax, groups, study.FULL),
     "Left: loss by position in the window. Right: the same less that of 100 %."),
]


def rates_table(page, name, groups):
    """The ladder: which rate each arm was confirmed at, and whether a smaller and a larger one were worse."""
    ladders = {label: ladder_of(runs) for label, runs in groups.items()}
    rates = sorted({lr for losses in ladders.values() for lr in losses}, key=float)
    rows = []
    for label, losses in ladders.items():
        best = min(losses, key=losses.get) if losses else None
        inside = best and list(losses).index(best) not in (0, len(losses) - 1)
        rows.append([label, *(number(losses.get(lr)) + " *" * (lr == best) for lr in rates), "yes" if inside else "no"])
    page.text("The ladder: validation loss at each peak learning rate, mean of its seeds; * marks the best, at which "
              "the arm is compared with new seeds. A best rate inside the ladder has a worse one on either side.")
    page.table(name, ["rotated", *(f"{float(lr):g}" for lr in rates), "inside"], rows)


def equivalence_table(page, name, groups):
    """Each arm against 100 %: difference unpaired and paired, the two one-sided tests, Holm over the arms."""
    losses = {label: study.losses_of(runs) for label, runs in groups.items()}
    full = losses.get(study.FULL, {})
    arms = [label for label in losses if label != study.FULL and len(losses[label]) > 1 and len(full) > 1]
    if not arms:
        return
    margin = study.MARGIN
    values = {label: (list(losses[label].values()), list(full.values())) for label in arms}
    same = study.holm([study.equivalence(*values[label], margin) for label in arms])
    other = study.holm([study.no_difference(*values[label]) for label in arms])
    rows = []
    for label, p_same, p_other in zip(arms, same, other):
        mean, half, _, _ = study.unpaired_difference(*values[label])
        deviation = np.sqrt(np.mean([np.var(sample, ddof=1) for sample in values[label]]))
        verdict = ("equivalent" if p_same < 0.05 else "") + (" but " if max(p_same, p_other) < 0.05 else "") + \
            (("worse" if mean > 0 else "better") if p_other < 0.05 else "")
        rows.append([label, f"{number(mean, sign=True)} ± {number(half)}",
                     study.interval_text(study.difference(groups, label)), number(p_same, 3), number(p_other, 3),
                     verdict or "undecided", number(study.seeds_needed(deviation, margin), 0)])
    page.text(
        f"Less the loss of 100 %, with 95 % intervals, the arms taken as two samples (Welch) and as pairs with the "
        f"same seed. Equivalent: two one-sided tests reject a difference of {margin:g} nats or more. Different: Welch's "
        f"test rejects none. Both at 5 %, corrected over the arms by Holm's method. Undecided is not equal. The last "
        f"column: seeds that it takes for an interval of ± {margin:g} with such a spread.")
    page.table(name, ["rotated", "difference ± 95 % CI", "paired", "p of a difference ≥ margin", "p of none", "verdict",
                      "seeds for ± margin"], rows)


# Stretches of positions in the window: from where words are known to where there is much to look back on.
POSITIONS = (8, 64), (64, 256), (256, math.inf)


def positions_table(page, name, groups):
    """Loss in stretches of the window, less that of 100 % at the same positions, as two samples."""
    def losses(label, begin, end):
        values = []
        for run in groups.get(label, []):
            if len(run.positions):
                low, high = run.positions["begin"], run.positions["end"]
                inside = (low >= begin) & (high <= end)
                values.append(np.average(run.positions["loss"][inside], weights=(high - low)[inside])
                              if inside.any() else math.nan)
        return values

    def text(label, stretch):
        mean, half, _, _ = study.unpaired_difference(losses(label, *stretch), losses(study.FULL, *stretch))
        return f"{number(mean, sign=True)} ± {number(half)}"

    if any(len(run.positions) for run in groups.get(study.FULL, [])):
        page.text("Loss by position in the window, less that of 100 % (Welch's interval):")
        page.table(name, ["rotated", *(f"{begin} to {end - 1}" if end < math.inf else f"{begin} on"
                                       for begin, end in POSITIONS)],
                   [[label, *(text(label, stretch) for stretch in POSITIONS)]
                    for label in groups if label != study.FULL])


def report(directory, every_run, measure_speed):
    """Writes report.html and what belongs to it into the directory; measure_speed: runner's, or what stands for it."""
    settings = {}
    in_order = sorted(every_run, key=lambda run: [int(part) if part.isdigit() else part
                                                  for part in re.split(r"(\d+)", setting_of(run))])
    for run in in_order:
        if run.state != "unfinished":
            setting = setting_of(run).strip("_").replace("=", " ").replace("_", ", ")
            settings.setdefault(setting, []).append(run)
    if not settings:
        raise UserError(f"{directory}: no finished run there")
    ladders = {setting: study.by_rotation(runs) for setting, runs in settings.items()}
    # Where there was a ladder, only what confirms is compared.
    settings = {setting: study.by_rotation(list(filter(confirms, runs)) or runs) for setting, runs in settings.items()}
    models = [next((run for run in runs if run.state == "finished"), runs[0])
              for groups in settings.values() for runs in groups.values()]
    speeds = measure_speed([run.directory for run in models])

    page = study.Report(directory, f"How much rotation: {Path(directory).name}")
    page.text(
        "Mean and standard deviation over seeds, which change the initial weights and the order of the data. The "
        "difference to 100 % is paired by seed, with the 95 % interval of Student's t for n pairs: three seeds give a "
        "wide one, and an interval that holds 0 means that this sweep cannot tell the two apart. The logit is the "
        "largest |q.k|/sqrt(head size) of any layer, head and seed. The spike score is the share of steps whose loss "
        "lies more than 7 standard deviations above the rolling mean of 128 or 1,000 steps. The training loss is the "
        "mean of the last 5 % of the steps: of text seen before, where a run sees it more than once. Tokens per second and "
        "the time in RoPE were measured alone, after the runs.")
    if len(settings) > 1:
        page.heading("Validation loss less that of 100 %, ± 95 % interval")
        labels = list(dict.fromkeys(label for groups in settings.values() for label in groups if label != study.FULL))
        page.table("overview", ["setting", *labels],
                   [[setting, *(study.interval_text(study.difference(groups, label)) for label in labels)]
                    for setting, groups in settings.items()])
    for setting, groups in settings.items():
        first = next(iter(groups.values()))[0]
        config = first.config
        page.heading(setting or config["preset"])
        page.text(
            f"{config['layers']} layers x {config['width']}, {config['heads']} heads of {config['head_size']}, "
            f"{config['block']} block, context {config['context']}, {config['steps']:,} steps of "
            f"{config['batch'] * config['context'] * config['accumulate']:,} tokens, peak learning rate "
            f"{'of the ladder' if 'lr' in first.arm else format(config['lr'], 'g')}, on {config['data']}, which a run "
            f"sees {number(first.epochs, 2)} times.")
        prefix = setting.replace(", ", "-").replace(" ", "-") + "-" * bool(setting)
        if any(map(ladder_of, ladders[setting].values())):
            rates_table(page, prefix + "rates", ladders[setting])
        equivalence_table(page, prefix + "equivalence", groups)
        positions_table(page, prefix + "by-position", groups)
        page.table(prefix + "table", HEADER, [row(label, runs, groups, speeds) for label, runs in groups.items()])
        for kind, left, right, caption in FIGURES:
            figure, axes = study.plt.subplots(1, 2, figsize=(11, 4.2))
            left(axes[0], groups)
            right(axes[1], groups)
            page.figure(prefix + kind, figure, caption)
    page.write()


def work():
    args, passed = parse(sys.argv[1:])
    failed = others = False
    if not args.report:
        failed, others = train(args, passed)
    if not others:
        directory = Path("runs", args.name)
        report(directory, study.read_runs(directory), runner.measure_speed)
    return 1 if failed else 0


if __name__ == "__main__":
    runner.main(work)
