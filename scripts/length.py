"""How far does a model look that was trained on short windows? Reads windows of 1, 2, 4 and 8 times the training
length, as the model is and with what is said to extend it, and writes a report.

    make length                                            on GPUs: trains the arms at 512 positions, then evaluates
    make length-cpu                                        on 2 cores, smaller
    make length ARGS="--runs runs/sweep --text-data 'data/novels/val_*.bin'"   evaluates runs that a sweep trained

The loss is that of the same target tokens at every length: the ends of the longest windows, of which the model sees
the last 512 positions, or 1,024 and so on. The gain is how much lower it is than with the training length and nothing
changed. So above 0 the model makes use of what lies further back, at 0 it might as well have had its window cut, and
below 0 it should have.

Its own flags are below; all others are those of sweep.py (see its --help), for the runs that are trained. With --runs
none is. Either way, of each of --fractions the first seeds that finished are evaluated: of those that confirm, where
there was a ladder of learning rates.
"""
import argparse
import glob
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import runner
import study
import sweep
from runner import UserError
from study import number

DEFAULTS = ["--name", "length", "--fractions", "0,2,0.1,0.1:head,0.25,1:nope4,1", "--seeds", "3", "--positions", "0"]

# How a trained model is changed: in words, the flags of `eval length`, and for which models that says something. A
# factor of 0 is the window's length over the training length. YaRN and PI leave a window of the training length alone.
# A pair of channels that turns once in 6.28 positions turns so with any base.
UNCHANGED = "none"
SCALINGS = {
    UNCHANGED: ("nothing", lambda c: [], lambda c: True),
    "base": ("base x 4", lambda c: [f"--rope-base={4 * c['rope_base']:g}"], lambda c: c["rotary_dim"] > 2),
    "pi": ("PI", lambda c: ["--rope-scale=0"], lambda c: c["rotary_dim"] > 0),
    "yarn": ("YaRN", lambda c: ["--yarn=0"], lambda c: c["rotary_dim"] > 0),
    "drop": ("no rotation", lambda c: ["--rotary-dim=0"], lambda c: c["rotary_dim"] > 0),
    "sharp9": ("temperature 0.9", lambda c: ["--attention-temperature=0.9"], lambda c: c["rotary_dim"] == 0),
    "sharp8": ("temperature 0.8", lambda c: ["--attention-temperature=0.8"], lambda c: c["rotary_dim"] == 0),
    # For comparison: from half the training length on, so what the last doubling within it brings.
    "half": ("half", lambda c: [f"--context={c['context'] // 2}"], lambda c: c["context"] > 1),
}


def parse(argv):
    own, passed = (argv[:argv.index("--")], argv[argv.index("--"):]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--runs", metavar="DIRECTORY", help="a study, or a pattern of runs: evaluate these, train none")
    parser.add_argument("--take", type=int, default=3, metavar="N",
                        help="seeds of each arm at most (default %(default)s)")
    parser.add_argument("--text-data", metavar="PATTERN", help="shards to read (default: each run's validation data)")
    parser.add_argument("--tokens", type=int, default=2**20, metavar="N",
                        help="tokens to predict at each length (default %(default)s)")
    args, others = parser.parse_known_args(own)
    training, passed = sweep.parse(DEFAULTS + others + passed)
    return args, training, passed


# ----------------------------------------------------------------------------------------------------------------------
# Evaluations

class Evaluation(runner.Job):
    """`eval length` of a run with one scaling, as a job for runner.train_all."""
    to_do = "to evaluate"

    def __init__(self, study_name, run, scaling, flags):
        super().__init__(f"{study_name}/evaluations", f"{run.name}_scaling={scaling}", [], steps=1)
        self.flags = [f"--run={run.directory}", *flags, *SCALINGS[scaling][1](run.config)]
        self.table = Path(f"{self.directory}.csv")

    def state(self):
        # What was made with other flags is made again.
        made = self.output.exists() and self.output.read_text(errors="replace").partition("\n")[0] == self.flags_line()
        return "finished" if made and self.table.with_suffix(".ends.csv").exists() else "unfinished"

    def next_program(self):
        return "eval" if self.state() == "unfinished" else None

    def next_command(self, threads, gpus=1):
        if not self.next_program():
            return None
        self.table.with_suffix(".ends.csv").unlink(missing_ok=True)
        return [f"{runner.BUILD}/eval", "length", *self.flags, f"--out={self.table}", f"--threads={threads}"]


def chosen(pattern, arms, seeds):
    """The finished runs of a study, or those that match a pattern, of these arms, up to `seeds` of each."""
    found = map(Path, sorted(glob.glob(pattern) if "*" in pattern else glob.glob(f"{pattern}/*")))
    by_arm = {arm: {} for arm in arms}
    for directory in found:
        config, summary = directory / "config.json", directory / "summary.json"
        if not config.exists() or not summary.exists() or json.loads(summary.read_text()).get("val_loss", 0) is None:
            continue
        run = SimpleNamespace(name=directory.name, directory=directory, config=json.loads(config.read_text()))
        study.read_name(run)
        arm = run.arm.get("rotate", "") + (":" + run.arm["with"] if "with" in run.arm else "")
        if arm in by_arm:
            by_arm[arm].setdefault(run.seed, []).append(run)
    runs = []
    for of_seed in by_arm.values():
        confirming = [seed for seed in of_seed if seed >= sweep.FIRST_CONFIRMING_SEED]
        for rank, seed in enumerate(sorted(confirming or of_seed)[:seeds]):
            if len(of_seed[seed]) > 1:
                names = ", ".join(run.name for run in of_seed[seed])
                raise UserError(f"{pattern}: several runs of seed {seed}, {names}; --runs takes a pattern too, to say "
                                "which are meant")
            runs += [(rank, run) for run in of_seed[seed]]
    return [run for _, run in sorted(runs, key=lambda ranked: ranked[0])]  # what is stopped early has whole seeds


def evaluate(args, training, passed):
    """As runner.train_all."""
    where = args.runs or f"runs/{training.name}"
    runs = chosen(where, training.fractions, args.take)
    if not runs:
        raise UserError(f"{where}: no finished run of {', '.join(training.fractions)} there")
    flags = [f"--tokens={args.tokens}"] + [f"--data={args.text_data}"] * bool(args.text_data)
    flags += [flag for flag in passed if flag.startswith(("--device=", "--dtype="))]
    return runner.train_all([Evaluation(training.name, run, scaling, flags) for run in runs
                             for scaling, (_, _, applies) in SCALINGS.items() if applies(run.config)], training.jobs)


# ----------------------------------------------------------------------------------------------------------------------
# What they say

def read(path):
    """The evaluated runs of a study, runs/NAME, or of the file that its report wrote: name, arm, seed, config, text
    (the shards), windows (how many). For each scaling: `ends`, {length: loss on the same targets}; `errors`, {length:
    standard error between windows of its difference to the training length}; `positions`, the loss by position in the
    longest windows."""
    path = Path(path)
    if path.suffix == ".json":
        shared, *lines = json.loads(path.read_text())
        runs = [SimpleNamespace(**line | dict(config=shared | line["config"])) for line in lines]
    else:
        runs = {}
        for file in sorted((path / "evaluations").glob("*.ends.csv")):
            name, _, scaling = file.name.removesuffix(".ends.csv").rpartition("_scaling=")
            output = file.with_name(f"{name}_scaling={scaling}.txt").read_text(errors="replace")
            flags = dict(word[2:].partition("=")[::2] for word in output.partition("\n")[0].split())
            if name not in runs:
                config = json.loads(Path(flags["run"], "config.json").read_text())
                runs[name] = SimpleNamespace(name=name, config=config, text=flags.get("data", config["val"]), windows=0,
                                             ends={}, errors={}, positions={})
            run, ends = runs[name], study.read_csv(file)
            table = study.read_csv(file.with_name(f"{name}_scaling={scaling}.csv"))
            run.windows = int(ends["windows"][0])
            for column, values in ((run.ends, ends["loss"]), (run.errors, ends["gain_stderr"])):
                column[scaling] = {f"{T:.0f}": float(value) for T, value in zip(ends["context"], values)}
            longest = table["context"] == table["context"].max()
            run.positions[scaling] = {key: table[key][longest].tolist() for key in ("begin", "end", "loss")}
        runs = list(runs.values())
    for run in runs:
        study.read_name(run)
        run.ends, run.errors = ({scaling: {int(T): value for T, value in of.items()} for scaling, of in column.items()}
                                for column in (run.ends, run.errors))
    return runs


def pack(runs, path):
    """What read() gave, as a file that it reads: a line for what the configurations share, and one for each run."""
    shared = study.shared_config(runs)
    lines = [{key: getattr(run, key) for key in ("name", "text", "windows", "ends", "errors", "positions")}
             | {"config": {key: value for key, value in run.config.items() if key not in shared}} for run in runs]
    study.write_lines(path, [shared, *lines])


def gain(run, scaling, length):
    """How much lower the loss is, on the same targets, than in windows of the training length with nothing changed."""
    return run.ends[UNCHANGED][run.config["context"]] - run.ends[scaling][length]


def last_doubling(run):
    """The gain of windows of the training length over half of them, on the same targets; nan if not measured."""
    context, half = run.config["context"], run.ends.get("half", {})
    return half[context // 2] - half[context] if half else math.nan


def gains(runs, scaling, length):
    """Over the seeds: mean, half-width of its 95 % interval, number."""
    return study.mean_interval([gain(run, scaling, length) for run in runs if scaling in run.ends])


def lengths_of(runs):
    return sorted(runs[0].ends[UNCHANGED])


# ----------------------------------------------------------------------------------------------------------------------
# The report

def plot_gain(ax, groups, scaling):
    """Gain by length with one scaling, a line for each arm that has it, and the band between its seeds."""
    lengths = lengths_of(next(iter(groups.values())))
    for label, runs in groups.items():
        curves = [(np.array(lengths), [gain(run, scaling, T) for T in lengths]) for run in runs if scaling in run.ends]
        if curves:
            study.draw_over_seeds(ax, label, curves, markers=True)
    ax.axhline(0, color="#000000", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{T:,}" for T in lengths])
    ax.set_yscale("symlog", linthresh=0.1)
    ax.yaxis.set_major_locator(study.plt.FixedLocator([-3, -1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1]))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    ax.yaxis.set_minor_locator(study.plt.NullLocator())
    ax.set(xlabel="positions seen", ylabel="gain, nats per token")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


def plot_positions(ax, groups, scaling):
    """Loss by position in the longest windows with one scaling; the training length is dotted."""
    def with_positions(run):
        return SimpleNamespace(positions={key: np.array(values) for key, values in run.positions[scaling].items()})

    shown = {label: [with_positions(run) for run in runs if scaling in run.positions] for label, runs in groups.items()}
    study.plot_loss_by_position(ax, {label: runs for label, runs in shown.items() if runs})
    ax.axvline(next(iter(groups.values()))[0].config["context"], color="#555555", linestyle=":", linewidth=1)


def panels(groups, draw):
    """A figure with a panel for each scaling that at least two arms have, drawn by draw(ax, groups, scaling)."""
    shown = [scaling for scaling in SCALINGS if scaling != "half" and
             sum(any(scaling in run.ends for run in runs) for runs in groups.values()) > 1]
    return study.side_by_side({SCALINGS[scaling][0]: lambda ax, scaling=scaling: draw(ax, groups, scaling)
                               for scaling in shown}, height=7, columns=2, same_y=True)[0]


def report(name):
    directory = Path("runs", name)
    runs = [run for run in read(directory) if UNCHANGED in run.ends]
    if not runs:
        raise UserError(f"runs/{name}: no evaluation there")
    if len({(run.text, run.windows, *run.ends[UNCHANGED]) for run in runs}) > 1:
        raise UserError(f"runs/{name}: evaluations of different text, or of different amounts; take another --name, or "
                        f"remove {directory}/evaluations")
    pack(runs, directory / "length.json")
    groups, lengths, config = study.by_rotation(runs), lengths_of(runs), runs[0].config
    longer, context = lengths[1:], lengths[0]
    page = study.Report(directory, f"How far a model looks: {name}")
    error = np.mean([run.errors[UNCHANGED][lengths[-1]] for run in runs])
    step_tokens = config["batch"] * config["context"] * config["accumulate"]
    page.text(
        f"{config['layers']} layers x {config['width']}, {config['heads']} heads of {config['head_size']}, trained "
        f"at {context} positions for {config['steps']:,} steps of {step_tokens:,} tokens on {config['data']}; read "
        f"here: {runs[0].text}, {runs[0].windows:,} windows of {lengths[-1]:,}. The loss is that of the last "
        f"{context // 2} tokens of each, the same at every length. Gain: how much lower it is than with {context} "
        f"positions and nothing changed. Above 0 what lies further back is used; below 0 a window cut to {context} "
        "is better; an interval that holds 0 tells neither. Intervals are of 95 %, over the seeds, which all read "
        f"the same text: with other text of this amount a gain would differ by another {error:.4f} (standard error "
        f"between the windows, at {lengths[-1]:,}).")
    page.heading("As they were trained")
    page.text(f"The last column is what doubling the window from {context // 2} to {context} positions brings, which "
              "the models were trained for: a yardstick for the gains.")
    rows = [[label, len(of), number(float(np.mean([run.ends[UNCHANGED][context] for run in of]))),
             *(interval(gains(of, UNCHANGED, T)) for T in longer),
             interval(study.mean_interval([last_doubling(run) for run in of]))] for label, of in groups.items()]
    page.table("lengths", ["rotated", "seeds", f"loss at {context}", *(f"gain at {T:,}" for T in longer),
                           f"gain of {context} over {context // 2}"], rows)
    page.heading("With what is said to extend them")
    page.text(f"At {context} the gain is what the change costs there. PI and YaRN take the window's length over "
              f"{context} as their factor, and so change nothing there. A temperature below 1 sharpens attention.")
    page.table("scalings", ["rotated", "changed", *(f"gain at {T:,}" for T in lengths)],
               [[label, SCALINGS[scaling][0], *(interval(gains(of, scaling, T)) for T in lengths)]
                for label, of in groups.items() for scaling in SCALINGS
                if scaling not in (UNCHANGED, "half") and any(scaling in run.ends for run in of)])
    page.heading("Plots")
    for file, draw, caption in (
            ("gain", plot_gain, "Gain over a window cut to the training length, mean of the seeds and the band between "
             "them; the scale is linear within 0.1 nats and logarithmic beyond."),
            ("positions", plot_positions, f"Loss by position in windows of {lengths[-1]:,}, all tokens of them.")):
        page.figure(file, panels(groups, draw), caption)
    page.write()


def interval(of):
    return study.interval_text(of).partition(" (")[0]


def work():
    args, training, passed = parse(sys.argv[1:])
    failed = others = False
    if not training.report:
        if not args.runs:
            failed, others = sweep.train(training, passed)
        if not others:
            more_failed, others = evaluate(args, training, passed)
            failed = failed or more_failed
    if not others:
        report(training.name)
    return 1 if failed else 0


if __name__ == "__main__":
    runner.main(work)
