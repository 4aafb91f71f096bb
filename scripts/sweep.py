"""How much rotation does a model need? Trains it with several rotary fractions and seeds, and writes a report.

    make sweep                                          on a GPU, the built-in corpus
    make sweep-cpu                                      the same on 2 cores, smaller
    make sweep ARGS="--name wiki --data 'data/wiki/train_*.bin' --context 512,2048"
    build-python/bin/python scripts/sweep.py --help     all of its own flags

What stands behind -- goes to `train` as it is: -- --layers 12 --width 512 --lr 1e-3. The paper's other axes take lists,
and each combination gets a section of the report: --preset (size), --context, --data, --block.
"""
import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np

import runner
import study
from runner import UserError
from study import number

# Flags of `train` that a sweep sets itself.
OWN = "run resume steps ranks lanes seed rotary-dim rotary-fraction preset context block data".split()


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
    add("seeds", 3, "seeds 1 to N (default 3)")
    add("steps", 1000, "steps of a run (default 1000)")
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
    axes = [[(axis, value) for value in getattr(args, axis) or [""]] for axis in ("preset", "context", "block", "data")]
    for choice in itertools.product(*axes):
        flags = [f"--{axis}={value}" for axis, value in choice if value]
        context = dict(choice)["context"]
        if args.step_tokens:
            if not context.isdigit() or not int(context) or args.step_tokens % int(context):
                raise UserError(f"--context {context}: must divide the --step-tokens of {args.step_tokens}")
            flags.append(f"--batch={args.step_tokens // int(context)}")
        name = ""
        for axis, value in choice:
            if len(getattr(args, axis) or []) > 1:
                name += f"{axis}={Path(value).parent.name.replace('_', '-') if axis == 'data' else value}_"
        yield name, flags


def jobs_of(args, passed):
    settings = list(settings_of(args))
    if len({name for name, _ in settings}) < len(settings):
        raise UserError("--data: the data sets must lie in directories of different names")
    jobs = []
    for seed, (setting, flags), rotate in itertools.product(range(1, args.seeds + 1), settings, args.fractions):
        flags = flags + passed + [runner.rotation_flag("--fractions", rotate), f"--seed={seed}"]
        name = f"{setting}rotate={rotate}_seed={seed}"
        jobs.append(runner.Job(args.name, name, flags, args.steps, args.positions))
    return jobs


# ----------------------------------------------------------------------------------------------------------------------
# The report. A setting is a combination of the axes; in it {label of a rotation: runs by seed}.

HEADER = ["rotated", "channels", "seeds", "validation loss ± sd", "less that of 100 % ± 95 % CI",
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


def report(name):
    settings = {}
    for run in study.read_runs(Path("runs", name)):
        if run.state != "unfinished":
            setting = run.name.partition("rotate=")[0].strip("_").replace("=", " ").replace("_", ", ")
            settings.setdefault(setting, []).append(run)
    if not settings:
        raise UserError(f"runs/{name}: no finished run there")
    settings = {setting: study.by_rotation(runs) for setting, runs in settings.items()}
    models = [next((run for run in runs if run.state == "finished"), runs[0])
              for groups in settings.values() for runs in groups.values()]
    speeds = runner.measure_speed([run.directory for run in models])

    page = study.Report(Path("runs", name), f"How much rotation: {name}")
    page.text(
        "Mean and standard deviation over seeds, which change the initial weights and the order of the data. The "
        "difference to 100 % is paired by seed, with the 95 % interval of Student's t for n pairs: three seeds give a "
        "wide one, and an interval that holds 0 means that this sweep cannot tell the two apart. The logit is the "
        "largest |q.k|/sqrt(head size) of any layer, head and seed. The spike score is the share of steps whose loss "
        "lies more than 7 standard deviations above the rolling mean of 128 or 1,000 steps. Tokens per second and the "
        "time in RoPE were measured alone, after the runs.")
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
            f"{config['lr']:g}, on {config['data']}, which a run sees {number(first.epochs, 2)} times.")
        prefix = setting.replace(", ", "-").replace(" ", "-") + "-" * bool(setting)
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
        failed, others = runner.train_all(jobs_of(args, passed), args.jobs, args.gpus_per_run)
    if not others:
        report(args.name)
    return 1 if failed else 0


if __name__ == "__main__":
    runner.main(work)
