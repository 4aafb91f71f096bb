"""What a study's runs say: files into arrays, statistics, plots, the page of a report. For sweep.py, nope.py and the
notebooks.

A run's directory is runs/STUDY/NAME, with a NAME such as rotate=0.1_seed=2 that says what was varied.

    python scripts/study.py pack runs/sweep notebooks/sweep.json      a study in one small file, for the notebooks
"""
import base64
import csv
import html
import io
import json
import math
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import plots
import runner

# ----------------------------------------------------------------------------------------------------------------------
# Runs


def read_csv(path):
    """The columns of a csv file as {name: array}; strings only where a column holds no numbers. {} if there is none."""
    try:
        with open(path, newline="") as file:
            header, *rows = list(csv.reader(file))
    except (OSError, ValueError):
        return {}
    rows = [row for row in rows if len(row) == len(header)]

    def array(values):
        try:
            return np.array(values, dtype=float)
        except ValueError:
            return np.array(values)

    return {name: array([row[i] for row in rows]) for i, name in enumerate(header)}


def read_run(directory):
    """A run: name, arm {key: text}, seed, config, summary ({} unless finished), and the csv files as columns.

    `state` is finished, diverged (loss, gradient or validation loss became inf or nan) or unfinished. `epochs`: how often all of its
    steps see the training data; nan if unknown. Losses in nats per token: `initial_loss`, the first step's, before its
    update; `final_loss`, mean of the last 5 % of the steps, inf for a run that diverged. `largest_z`: see there.
    `logit_step`, `logit`, `entropy`: the largest |attention logit| of all layers and heads and the smallest head's
    entropy in nats, per diagnostics step.
    """
    directory = Path(directory)
    run = SimpleNamespace(name=directory.name, directory=directory)
    for name in ("config", "summary"):
        path = directory / f"{name}.json"
        setattr(run, name, json.loads(path.read_text()) if path.exists() else {})
    read_name(run)
    for name in ("log", "val", "layers", "tensors", "spikes", "positions"):
        setattr(run, name, read_csv(directory / f"{name}.csv"))
    output = Path(f"{directory}.txt")
    found = re.search(r"so ([\d.]+) epochs", output.read_text(errors="replace")) if output.exists() else None
    run.epochs = float(found[1]) if found else math.nan
    last = [file[name][-1] for file, name in ((run.log, "loss"), (run.log, "grad_norm"), (run.val, "val_loss"))
            if len(file.get(name, []))]
    finite = np.isfinite(last).all() and run.summary.get("val_loss", 0) is not None
    run.state = "diverged" if not finite else "finished" if run.summary else "unfinished"
    loss = run.log.get("loss", np.array([]))
    run.initial_loss = float(loss[0]) if len(loss) else math.nan
    tail = loss[-max(1, len(loss) // 20):]
    run.final_loss = math.inf if run.state == "diverged" else float(tail.mean()) if len(tail) else math.nan
    run.largest_z = largest_z(loss)
    run.logit_step, run.logit, run.entropy = np.array([]), np.array([]), np.array([])
    if len(run.layers.get("step", [])):
        run.logit_step, row = np.unique(run.layers["step"], return_inverse=True)
        run.logit, run.entropy = np.zeros(len(run.logit_step)), np.full(len(run.logit_step), np.inf)
        np.maximum.at(run.logit, row, run.layers["max_logit"])
        np.minimum.at(run.entropy, row, run.layers["entropy"])
    return run


def read_name(run):
    run.arm = dict(part.partition("=")[::2] for part in run.name.split("_"))
    run.seed = int(run.arm.get("seed", run.config.get("seed", 0)))


def read_runs(path):
    """All runs of a study: of its directory runs/STUDY, or of a file that pack() wrote."""
    path = Path(path)
    if path.suffix == ".json":
        return unpack(path)
    return [read_run(config.parent) for config in sorted(path.glob("*/config.json"))]


# A study in one file, small enough for git: what the runs share of their configurations, and a line for each run that
# ended, with curves of POINTS points. The training loss and the gradient norm are means of stretches; of the heads only
# the last diagnostics step is kept.
POINTS = 60
KEPT = ["name", "state", "epochs", "initial_loss", "final_loss", "largest_z", "summary", "spikes", "positions"]


def shared_config(runs):
    """What the configurations of all runs have in common."""
    return {key: value for key, value in runs[0].config.items() if all(run.config[key] == value for run in runs)}


def pack(directory, path):
    runs = [run for run in read_runs(directory) if run.state != "unfinished"]
    if not runs:
        raise runner.UserError(f"{directory}: no finished run there")
    shared = shared_config(runs)
    lines = []
    for run in runs:
        parts = [slice(len(run.log["loss"]) * i // POINTS, len(run.log["loss"]) * (i + 1) // POINTS)
                 for i in range(POINTS)]
        n = len(run.logit_step)
        apart = max(1, -(-n // POINTS))
        every = slice((n - 1) % apart, None, apart)  # the last one included
        last = run.layers["step"] == run.layers["step"][-1] if len(run.layers.get("step", [])) else []
        lines.append({key: getattr(run, key) for key in KEPT} | {
            "config": {key: value for key, value in run.config.items() if key not in shared},
            "log": {key: [run.log[key][part].mean() for part in parts if part.start < part.stop]
                    for key in ("step", "loss", "grad_norm")},
            **{key: getattr(run, key)[every] for key in ("logit_step", "logit", "entropy")},
            "layers": {key: values[last] for key, values in run.layers.items()}})
    write_lines(path, [shared, *lines])


def write_lines(path, lines):
    """A list as a json file, an entry in each line, with no more digits than are of use."""
    def short(value, digits=7):  # of floats; 5 in curves
        if isinstance(value, dict):
            return {key: short(entry, digits) for key, entry in value.items()}
        if isinstance(value, (list, np.ndarray)):
            return [short(entry, 5) for entry in value]
        if isinstance(value, float):
            value = float(f"{value:.{digits}g}")
            return int(value) if value.is_integer() else value
        return value

    text = ",\n".join(json.dumps(line, separators=(",", ":")) for line in map(short, lines))
    Path(path).write_text("[" + text + "]\n")


def unpack(path):
    shared, *lines = json.loads(Path(path).read_text())

    def arrays(columns):
        return {key: np.array(values, dtype=float) for key, values in columns.items()}

    runs = []
    for line in lines:
        run = SimpleNamespace(**line | dict(config=shared | line["config"], directory=None, val={}, tensors={}))
        read_name(run)
        for name in ("log", "layers", "positions", "spikes"):
            setattr(run, name, arrays(line[name]))
        config = run.config
        run.log["tokens"] = run.log["step"] * (config["batch"] * config["accumulate"] * config["context"])
        vars(run).update(arrays({key: line[key] for key in ("logit_step", "logit", "entropy")}))
        runs.append(run)
    return runs


def heads_at_end(run, column):
    """A column of layers.csv at the last diagnostics step, (layers, heads)."""
    last = run.layers["step"] == run.layers["step"][-1]
    layer, head = run.layers["layer"][last].astype(int), run.layers["head"][last].astype(int)
    values = np.full((layer.max() + 1, head.max() + 1), np.nan)
    values[layer, head] = run.layers[column][last]
    return values


# What an arm may have beside its rotation: the flag of `train`, and how tables call it.
OTHERS = {"qk-norm": ("--qk-norm", " + QK-Norm"), "head": ("--rope-frequencies=head", ", the head's frequencies"),
          "nope4": ("--rotary-layers=nope:4", ", every 4th layer NoPE"),
          "softcap": ("--attention-softcap=50", " + soft-cap"), "clip": ("--qk-clip=100", " + clip")}


def arm_flags(flag, arm):
    """The flags of `train` for an arm such as 0.1 or 0:qk-norm, that `flag` gave; and the part of a run's name."""
    rotate, _, other = arm.partition(":")
    if other and other not in OTHERS:
        raise runner.UserError(f"{flag} {arm}: behind the colon stands one of {', '.join(OTHERS)}")
    flags = [runner.rotation_flag(flag, rotate)] + ([OTHERS[other][0]] if other else [])
    return flags, f"rotate={rotate}" + f"_with={other}" * bool(other)


def rotation_label(rotate, other=""):
    """`rotate` as sweep's --fractions has it: a share of the head up to 1, above it a number of channels."""
    value = float(rotate)
    text = "0 % (NoPE)" if value == 0 else f"{value:g} channels" if value > 1 else f"{100 * value:g} %"
    return text + (OTHERS[other][1] if other else "")


FULL = rotation_label(1)
# Losses that differ by less, in nats per token, count as equal: fixed before the runs that are compared were made.
MARGIN = 0.01


def other_of(run):
    """What its arm has beside the rotation, a key of OTHERS or nothing; older runs have qknorm=1 in their names."""
    return run.arm.get("with") or ("qk-norm" if run.arm.get("qknorm") == "1" else "")


def by_rotation(runs):
    """{label: runs in the order of their seeds}, from little to much rotation."""
    def key(run):  # channels come before shares
        rotate = float(run.arm["rotate"])
        return rotate if rotate <= 1 else 1e-9 * rotate, other_of(run), run.seed

    groups = {}
    for run in sorted(runs, key=key):
        groups.setdefault(rotation_label(run.arm["rotate"], other_of(run)), []).append(run)
    return groups


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def t_shares(degrees):
    """Angles from 0 to pi/2, and which share of Student's t lies within -t .. t for t = sqrt(degrees) tan(angle)."""
    # The density of the angle is cos(angle)^(degrees - 1): no infinite tails to integrate.
    angle = np.linspace(0, np.pi / 2, 100001)
    density = np.cos(angle) ** (degrees - 1)
    share = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return angle, share / share[-1]


def t_quantile(degrees, level=0.95):
    """Half-width of a two-sided interval of Student's t, in standard errors."""
    angle, share = t_shares(degrees)
    return math.sqrt(degrees) * math.tan(np.interp(level, share, angle))


def t_tail(t, degrees):
    """The probability that Student's t is larger than t."""
    angle, share = t_shares(degrees)
    within = np.interp(math.atan(abs(t) / math.sqrt(degrees)), angle, share)
    return (1 - within) / 2 if t > 0 else (1 + within) / 2


def mean_interval(values):
    """Mean of the values, half-width of its 95 % confidence interval (nan for fewer than two), their number."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return (values[0] if n else math.nan), math.nan, n
    return values.mean(), t_quantile(n - 1) * values.std(ddof=1) / math.sqrt(n), n


def paired_difference(values, reference):
    """mean_interval of values - reference, both {seed: value}, over the seeds that both have."""
    return mean_interval([values[seed] - reference[seed] for seed in sorted(values) if seed in reference])


def unpaired_difference(values, reference):
    """Mean of the values less that of the reference, half-width of its 95 % interval by Welch's formula, the standard
    error, and the degrees of freedom; nan where either has fewer than two."""
    a, b = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if min(len(a), len(b)) < 2:
        return (a.mean() - b.mean() if len(a) and len(b) else math.nan), math.nan, math.nan, math.nan
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(parts))
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return a.mean() - b.mean(), t_quantile(degrees) * error, error, degrees


def equivalence(values, reference, margin):
    """Of two one-sided tests (Schuirmann 1987): the larger probability of such data if the means really differ by the
    margin, in either direction. Below 0.05 they are equivalent within the margin."""
    mean, _, error, degrees = unpaired_difference(values, reference)
    return max(t_tail((margin - mean) / error, degrees), t_tail((margin + mean) / error, degrees))


def no_difference(values, reference):
    """The probability of a difference of the means at least as large if there is none, by Welch's test."""
    mean, _, error, degrees = unpaired_difference(values, reference)
    return 2 * t_tail(abs(mean) / error, degrees)


def holm(probabilities):
    """Holm's correction of several probabilities (1979): the smallest times their number, the next times one less ..."""
    order = np.argsort(probabilities)
    corrected, largest = np.empty(len(order)), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * probabilities[i]))
        corrected[i] = largest
    return list(corrected)


def at_least(count, n, share):
    """The probability that at least `count` of n succeed, each with this probability."""
    return sum(math.comb(n, k) * share**k * (1 - share)**(n - k) for k in range(count, n + 1))


def share_interval(count, n):
    """The exact 95 % interval of a share of which `count` of n were seen (Clopper and Pearson 1934)."""
    def share_where(count, probability):  # that at least `count` are seen
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(count, n, middle) < probability else (low, middle)
        return low

    return share_where(count, 0.025) if count else 0.0, share_where(count + 1, 0.975) if count < n else 1.0


def half_point(doses, counts, n):
    """The dose at which half of them fail, if more fail the larger it is: (estimate, low, high), from the numbers
    `counts` that failed of `n` each at rising doses. 0 stands for below the smallest dose, inf for above the largest.

    The estimate: shares that fall as the dose rises are averaged (isotonic regression), and half is looked for between
    them on a logarithmic scale. The 95 % interval supposes no curve and is exact. It begins at the last dose, going up,
    whose share has an exact interval below one half, and ends at the last, going down, whose share has one above it. An
    end is wrong only if the first dose beyond the true one shows so, in 2.5 % of cases at most. Doses with so few runs
    (up to five) that not even the same end of all of them would show anything are passed over.
    """
    m, logs = len(doses), np.log(doses)
    shares = [max(min(sum(counts[j:k + 1]) / sum(n[j:k + 1]) for k in range(i, m)) for j in range(i + 1))
              for i in range(m)]
    half, below = logs[np.equal(shares, 0.5)], sum(share < 0.5 for share in shares)
    if len(half):  # the middle of all doses at which half fail
        estimate = math.exp((half[0] + half[-1]) / 2)
    elif below in (0, m):
        estimate = math.inf if below else 0.0
    else:
        estimate = math.exp(np.interp(0.5, shares[below - 1:below + 1], logs[below - 1:below + 1]))
    shown = [(dose, *share_interval(count, size)) for dose, count, size in zip(doses, counts, n)
             if share_interval(0, size)[1] < 0.5]
    low, high = 0.0, math.inf
    for dose, _, upper in shown:
        if upper >= 0.5:
            break
        low = dose
    for dose, lower, _ in shown[::-1]:
        if lower <= 0.5:
            break
        high = dose
    return estimate, low, high


def exact_test(counts, n, other_counts, other_n):
    """The probability of counts that differ in sum at least as much (no likelier than these) if at each dose both have
    the same share, two-sided: Fisher's exact test, over several doses at which two arms were tried (the question of
    Mantel and Haenszel, without their approximation). Each is a list with a number for each dose."""
    distribution = np.ones(1)  # of the sum of `counts`, given how many of both failed at each dose
    for size, other_size, total in zip(n, other_n, np.add(counts, other_counts)):
        distribution = np.convolve(distribution, [math.comb(size, k) * math.comb(other_size, total - k) / math.comb(
            size + other_size, total) if k <= total else 0.0 for k in range(size + 1)])
    return float(distribution[distribution <= distribution[sum(counts)] * (1 + 1e-9)].sum())


def seeds_needed(deviation, half_width):
    """Runs of each of two arms whose losses have this standard deviation, for a 95 % interval of their difference."""
    return next((n for n in range(2, 10000) if t_quantile(2 * n - 2) * deviation * math.sqrt(2 / n) <= half_width), None)


def largest_z(loss, window=128):
    """The most standard deviations that a step's loss lies above the mean of the `window` steps before it: above 7 is a
    spike (run/diagnostics.h). nan for a run that is no longer than that."""
    if len(loss) <= window:
        return math.nan
    before = np.lib.stride_tricks.sliding_window_view(loss, window)[:-1]
    with np.errstate(invalid="ignore", divide="ignore"):  # a run that diverged
        return float(np.max((loss[window:] - before.mean(1)) / before.std(1)))


def lr_sensitivity(losses, at_start):
    """Mean over learning rates of min(loss, loss at initialisation), less the best loss; nan if all of them diverged.

    Wortsman et al. 2023, arXiv 2309.14322, section 2.2: 0 if the learning rate does not matter. A diverged run's loss
    is inf or nan.
    """
    losses = np.asarray(losses, dtype=float)
    if not np.isfinite(losses).any():
        return math.nan
    return float(np.fmin(losses, at_start).mean() - np.fmin.reduce(losses))


def largest_stable(lrs, stable):
    """The largest learning rate up to which all are stable; nan if the smallest is not."""
    best = math.nan
    for lr, is_stable in sorted(zip(lrs, stable)):
        if not is_stable:
            break
        best = lr
    return best


def growth_per_1000(step, value):
    """Exponential growth rate over the last half of the steps: the slope of ln(value), per 1,000 steps."""
    keep = (step > step[-1] / 2) & (value > 0) & np.isfinite(value) if len(step) else np.array([], dtype=bool)
    if keep.sum() < 3:
        return math.nan
    return float(1000 * np.polyfit(step[keep], np.log(value[keep]), 1)[0])


def first_spike(run):
    """The first step whose loss spiked (spikes.csv); inf if none did."""
    return float(np.min(run.spikes["step"])) if len(run.spikes.get("step", [])) else math.inf


# ----------------------------------------------------------------------------------------------------------------------
# Plots. Each draws into axes that it is given, from {label: runs}.

# An arm has its colour in every plot, with another line and marker each for grey print.
STYLES = {"0 % (NoPE)": (plots.RED, "-", "o"), "0 % (NoPE) + QK-Norm": (plots.PINK, "--", "s"),
          "2 channels": (plots.ORANGE, "-.", "^"), "10 %": (plots.GREEN, "-", "D"), "25 %": (plots.SKY, "--", "v"),
          "50 %": (plots.GREY, "-.", "P"), "75 %": (plots.BLUE, ":", "X"), "100 %": (plots.BLACK, "-", "*"),
          "0 % (NoPE) + soft-cap": (plots.BLUE, "-.", "x"), "0 % (NoPE) + clip": (plots.GREY, ":", "P"),
          "10 %, the head's frequencies": (plots.GREEN, ":", "d"), "100 %, every 4th layer NoPE": (plots.BLACK, "--", "p")}


def style(label):
    """An arm's looks, the same in every plot: keyword arguments for a line, and for markers."""
    others = list(STYLES.values())
    color, line, marker = STYLES.get(label) or others[sum(label.encode()) % len(others)]
    return dict(color=color, linestyle=line), dict(color=color, marker=marker)


def side_by_side(draws, height=3, columns=0, same_y=False):
    """A figure as wide as a page of text: a panel for each of {title: draw(ax)}, `columns` in a row (0: all), and one
    legend below them. same_y: one vertical scale for all, so that panels can be compared."""
    columns = columns or len(draws)
    figure, axes = plt.subplots(-(-len(draws) // columns), columns, figsize=(6.3, height), squeeze=False,
                                sharey=same_y)
    handles = {}
    for ax in axes.flat[len(draws):]:
        ax.remove()
    for ax, (title, draw) in zip(axes.flat, draws.items()):
        draw(ax)
        ax.set_title(title)
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
        if ax.get_legend():
            ax.get_legend().remove()
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=4)
    return figure, axes.flat[:len(draws)]


def label_rotations(ax, labels):
    """A tick for each rotation, in words that stand beside each other: 0, 2 ch., 10, ..., 100."""
    ax.set_xticks(range(len(labels)), [label.replace(" (NoPE)", "").replace(" channels", " ch.").replace(" %", "")
                                       for label in labels])
    ax.set_xlabel("rotated share of each head, %")


def stretches(x, y, count=100):
    """x and y as means of `count` stretches: a curve without the noise of single steps."""
    parts = [part for part in np.array_split(np.arange(len(x)), count) if len(part)]
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def over_seeds(curves):
    """Curves (x, y) of several seeds as x, mean, lowest, highest, at the x values that all of them have."""
    if not curves:
        return (np.array([]),) * 4
    x = curves[0][0]
    for other, _ in curves[1:]:
        x = x[np.isin(x, other)]
    y = np.array([np.asarray(values)[np.isin(steps, x)] for steps, values in curves]).reshape(len(curves), -1)
    return x, y.mean(0), y.min(0), y.max(0)


def draw_over_seeds(ax, label, curves, markers=False):
    x, mean, low, high = over_seeds(curves)
    line, dots = style(label)
    ax.plot(x, mean, label=label, **line, **({"marker": dots["marker"], "markersize": 4} if markers else {}))
    if len(curves) > 1:
        ax.fill_between(x, low, high, color=line["color"], alpha=0.12, linewidth=0)


def plot_loss_curves(ax, groups):
    """Training loss over tokens: mean of the seeds, and the band between the lowest and the highest."""
    visible = []
    for label, runs in groups.items():
        whole = []
        for run in runs:
            if len(run.log.get("loss", [])) < 2:
                continue
            x, y = stretches(run.log["tokens"] * 1e-6, run.log["loss"])
            visible += [y[len(y) // 10:]]
            if run.state == "finished":
                whole.append((x, y))
            else:  # ends early: a line of its own
                ax.plot(x, y, **style(label)[0])
        draw_over_seeds(ax, label, whole)
    visible = np.concatenate(visible) if visible else np.array([])
    visible = visible[np.isfinite(visible)]
    floors = [run.summary["floor"] for runs in groups.values() for run in runs if "floor" in run.summary]
    if floors:
        ax.axhline(floors[0], color="#555555", linestyle=(0, (1, 3)), label="lowest reachable")
    if len(visible):
        low, high = visible.min(), visible.max()
        if floors and low - floors[0] < high - low:
            low = floors[0]
        ax.set_ylim(low - 0.03 * (high - low), high)
    ax.set(xlabel="training tokens, millions", ylabel="training loss, nats per token")
    ax.legend()


def plot_loss_curve_difference(ax, groups, reference=FULL):
    """Training loss less that of the reference, as means over the seeds: what the curves themselves hide."""
    curves = {}
    for label, runs in groups.items():
        logs = [run.log for run in runs if run.state == "finished"]
        curves[label] = [stretches(log["tokens"] * 1e-6, log["loss"], 50) for log in logs]
    base = over_seeds(curves.get(reference, []))[1]
    shown = []
    for label in curves:
        x, mean, _, _ = over_seeds(curves[label])
        if len(mean) and len(mean) == len(base) and label != reference:
            ax.plot(x, mean - base, label=label, **style(label)[0])
            shown.append((mean - base)[5:])
    ax.axhline(0, color="#000000", linewidth=1)
    if shown:  # the first tenth, where everything changes fast, may be cut
        low, high = min(0, np.min(shown)), max(0, np.max(shown))
        ax.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
        ax.legend()
    ax.set(xlabel="training tokens, millions", ylabel=f"training loss less that of {reference}, nats")


def losses_of(runs):
    """{seed: validation loss} of the runs that finished."""
    return {run.seed: run.summary["val_loss"] for run in runs if run.state == "finished"}


def difference(groups, label, reference=FULL):
    """Validation loss of an arm less that of the reference, paired by seed: mean, half-width, number of pairs."""
    return paired_difference(losses_of(groups.get(label, [])), losses_of(groups.get(reference, [])))


def plot_loss_by_fraction(ax, groups):
    """Validation loss of every run by rotation, and the mean."""
    means = []
    for i, (label, runs) in enumerate(groups.items()):
        values = list(losses_of(runs).values())
        means.append(np.mean(values) if values else np.nan)
        ax.plot([i] * len(values), values, linestyle="", markersize=7, alpha=0.8, **style(label)[1])
    ax.plot(range(len(means)), means, color="#555555", linewidth=1, zorder=0)
    label_rotations(ax, groups)
    ax.set_ylabel("validation loss, nats per token")


def plot_difference(ax, groups, reference=FULL):
    """Difference of the validation loss to the reference, paired by seed, with its 95 % interval."""
    for i, (label, runs) in enumerate(groups.items()):
        mean, half, n = difference(groups, label, reference)
        if label == reference:
            continue
        if n:
            ax.errorbar([i], [mean], yerr=None if math.isnan(half) else [
                        half], capsize=4, markersize=7, **style(label)[1])
    ax.axhline(0, color="#000000", linewidth=1)
    label_rotations(ax, groups)
    ax.set_ylabel(f"validation loss less that of {reference}, nats")


def plot_logits(ax, groups):
    """Largest attention logit of all layers and heads, a line per run."""
    for label, runs in groups.items():
        for i, run in enumerate(run for run in runs if len(run.logit)):
            ax.plot(run.logit_step, run.logit, label=label if i == 0 else None, **style(label)[0] | {"linewidth": 1.2})
    ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="largest |attention logit|")
    if ax.lines:
        ax.legend()


def plot_gradient_norms(ax, groups):
    """Norm of the gradient before clipping, a line per run."""
    for label, runs in groups.items():
        for i, run in enumerate(run for run in runs if len(run.log.get("loss", [])) > 1):
            x, y = stretches(run.log["step"], run.log["grad_norm"])
            ax.plot(x, y, label=label if i == 0 else None, **style(label)[0] | {"linewidth": 1.2})
    ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="gradient norm before clipping")


def position_curve(run):
    """Middle of each stretch of positions, counted from 1, and the loss there."""
    return (run.positions["begin"] + run.positions["end"] + 1) / 2, run.positions["loss"]


def plot_loss_by_position(ax, groups, reference=None):
    """Loss by position in the window, mean of the seeds; with `reference`, less that arm's."""
    base = over_seeds([position_curve(run) for run in groups.get(reference, []) if len(run.positions)])[1]
    for label, runs in groups.items():
        curves = [position_curve(run) for run in runs if len(run.positions)]
        if curves and reference:
            x, mean, _, _ = over_seeds(curves)
            if label != reference and len(base) == len(mean):
                draw_over_seeds(ax, label, [(x, mean - base)], markers=True)
        elif curves:
            draw_over_seeds(ax, label, curves, markers=True)
    if reference:
        ax.axhline(0, color="#000000", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="position in the window", ylabel="loss" +
           (f" less that of {reference}" if reference else "") + ", nats per token")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


# ----------------------------------------------------------------------------------------------------------------------
# The report


def number(value, digits=4, sign=False):
    """A number for a table: - where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, str):
        return value
    if math.isinf(value):
        return "inf"
    return f"{value:{'+' if sign else ''},.{digits}f}"


def interval_text(interval):
    """What mean_interval or paired_difference gave, for a table."""
    mean, half, n = interval
    return f"{number(mean, sign=True)} ± {number(half)} (n {n})" if n else "-"


class Report:
    """A page of headings, text, tables and figures: report.html, which is self-contained, and report.md. Beside them
    lie the figures as PNG files and the tables as csv files."""

    def __init__(self, directory, title):
        self.directory, self.title = Path(directory), title
        self.page, self.markdown = [f"<h1>{html.escape(title)}</h1>"], [f"# {title}\n"]

    def heading(self, text):
        self.page.append(f"<h2>{html.escape(text)}</h2>")
        self.markdown.append(f"## {text}\n")

    def text(self, text):
        self.page.append(f"<p>{html.escape(text)}</p>")
        self.markdown.append(text + "\n")

    def table(self, name, header, rows):
        def cells(row, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

        self.page.append("<table>" + cells(header, "th") + "".join(cells(row, "td") for row in rows) + "</table>")
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
        self.markdown.append("\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n")
        with open(self.directory / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    def figure(self, name, figure, caption):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a logarithmic axis without data
            figure.savefig(buffer, format="png")
        width = figure.get_figwidth() * plots.PIXELS_PER_INCH  # what is drawn has more, for screens that show more
        plt.close(figure)
        (self.directory / f"{name}.png").write_bytes(buffer.getvalue())
        image = base64.b64encode(buffer.getvalue()).decode()
        self.page.append(f'<figure><img alt="{html.escape(caption)}" width="{width:.0f}" src="data:image/png;base64,{image}">'
                         f"<figcaption>{html.escape(caption)}</figcaption></figure>")
        self.markdown.append(f"![{caption}]({name}.png)\n")

    def write(self):
        style = ("body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#111}"
                 "table{border-collapse:collapse;margin:1rem 0;font-size:14px}"
                 "th,td{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:right;vertical-align:top}"
                 "th:first-child,td:first-child{text-align:left}figure{margin:1.5rem 0}img{max-width:100%}"
                 "figcaption{color:#444;font-size:14px}")
        head = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
                f"<style>{style}</style></head><body>")
        (self.directory / "report.html").write_text(head + "\n".join(self.page) + "</body></html>\n")
        (self.directory / "report.md").write_text("\n".join(self.markdown))
        print("\n".join(part for part in self.markdown if not part.startswith("![")))
        print(f"Report: {self.directory}/report.html (tables also as report.md and .csv, figures as .png)")


def work():
    if len(sys.argv) != 4 or sys.argv[1] != "pack":
        raise runner.UserError("study.py: takes pack runs/NAME FILE.json")
    pack(sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    runner.main(work)
