"""How much rotation does a model need? Trains it with several rotary fractions and seeds, and writes a report.

  make sweep                                             on a GPU, the built-in corpus
  make sweep-cpu                                         the same on 2 cores, smaller
  make sweep ARGS="--name wiki --data 'data/wiki/train_*.bin' --context 512,2048"
  build-python/bin/python scripts/sweep.py --help        all of its own flags

Everything behind -- goes to `train` as it is: -- --layers 12 --width 512 --lr 1e-3. The paper's other axes take lists, and
each combination gets a section of the report: --preset (size), --context, --data, --block.
"""
import argparse
import itertools
import sys
from pathlib import Path

import runner
import study
from runner import UserError
from study import number


OWN = "run resume steps seed rotary-dim rotary-fraction preset context block data".split()  # not to be given behind --


def parse(argv):
  own, passed = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  items = lambda text: text.split(",")
  parser.add_argument("--name", default="sweep", help="the runs and the report go to runs/NAME (default %(default)s)")
  parser.add_argument("--fractions", type=items, default=items("0,2,0.1,0.25,0.5,0.75,1"), metavar="LIST",
                      help="shares of the head, up to 1; above 1 numbers of channels (default 0,2,0.1,0.25,0.5,0.75,1)")
  parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default %(default)s)")
  for axis, what in (("preset", "presets of train"), ("context", "positions in a window"),
                     ("block", "sequential, parallel"), ("data", "patterns of training shards")):
    parser.add_argument(f"--{axis}", type=items, metavar="LIST", help=what)
  parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of a run (default %(default)s)")
  parser.add_argument("--step-tokens", type=int, metavar="N", help="tokens of a step: sets train's --batch by the context")
  parser.add_argument("--positions", type=int, default=2**18, metavar="N", help="tokens for the loss by position (default %(default)s)")
  parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time; 0: what the machine takes (default)")
  parser.add_argument("--report", action="store_true", help="only write the report, of the runs that are there")
  return parser.parse_args(own), runner.joined(passed, OWN)


def settings_of(args):
  """Every combination of the axes as (parts of the runs' names, flags of train); an axis of one value names nothing."""
  if args.context and len(args.context) > 1 and not args.step_tokens:
    raise UserError("--context: several contexts need --step-tokens, or steps would differ in tokens")
  axes = [[(axis, value) for value in getattr(args, axis) or [None]] for axis in ("preset", "context", "block", "data")]
  for choice in itertools.product(*axes):
    choice = [(axis, value) for axis, value in choice if value]
    flags = [f"--{axis}={value}" for axis, value in choice]
    context = dict(choice).get("context")
    if args.step_tokens:
      if not context:
        raise UserError("--step-tokens: needs --context as well")
      if not context.isdigit() or args.step_tokens % int(context):
        raise UserError(f"--context {context}: must divide the --step-tokens of {args.step_tokens}")
      flags.append(f"--batch={args.step_tokens // int(context)}")
    short = lambda axis, value: Path(value).parent.name.replace("_", "-") if axis == "data" else value
    yield "".join(f"{axis}={short(axis, value)}_" for axis, value in choice if len(getattr(args, axis)) > 1), flags


def jobs_of(args, passed):
  settings = list(settings_of(args))
  if len({name for name, _ in settings}) < len(settings):
    raise UserError("--data: the data sets must lie in directories of different names")
  jobs = []
  for seed, (setting, flags), rotate in itertools.product(range(1, args.seeds + 1), settings, args.fractions):
    try:
      rotation = f"--rotary-dim={int(rotate)}" if float(rotate) > 1 else f"--rotary-fraction={float(rotate)}"
    except ValueError:
      raise UserError(f"--fractions {rotate}: must be shares up to 1, or numbers of channels") from None
    jobs.append(runner.Job(args.name, f"{setting}rotate={rotate}_seed={seed}", flags + passed + [rotation, f"--seed={seed}"],
                           args.steps, args.positions))
  return jobs


def table(groups, speeds):
  """A row per rotation."""
  rows = []
  reference = study.losses_of(groups.get("100 %", []))
  for label, runs in groups.items():
    finished = [run for run in runs if run.state == "finished"]
    diverged = sum(run.state == "diverged" for run in runs)
    losses = study.losses_of(runs)
    mean, _, n = study.mean_interval(list(losses.values()))
    spread = f" ± {study.np.std(list(losses.values()), ddof=1):.4f}" if n > 1 else ""
    difference = "-" if label == "100 %" else study.interval_text(study.paired_difference(losses, reference))
    most = lambda key: max((run.summary[key] for run in finished if key in run.summary), default=study.math.nan)
    average = lambda key: study.mean_interval([run.summary[key] for run in finished if key in run.summary])[0]
    tokens, rope = next((speeds[run.directory] for run in runs if run.directory in speeds), (study.math.nan, study.math.nan))
    config = runs[0].config
    rows.append([label, f"{config['rotary_dim']} of {config['head_size']}", f"{n}" + (f" ({diverged} diverged)" if diverged else ""),
                 number(mean) + spread, difference, number(most("max_logit"), 1), number(most("max_logit_ever"), 1),
                 number(100 * average("spike_score_128"), 2) + " / " + number(100 * average("spike_score_1000"), 2),
                 number(most("rope_table_bytes"), 0), number(1e3 * rope, 3), number(tokens, 0)])
  return rows

HEADER = ["rotated", "channels", "seeds", "validation loss ± sd", "less that of 100 % ± 95 % CI", "largest logit, end", "ever",
          "spike score 128 / 1,000, %", "RoPE table, bytes", "RoPE, ms/step", "tokens/s"]


def title(setting):
  return setting.replace("=", " ").replace("_", ", ")


def report(name):
  runs = [run for run in study.read_runs(name) if run.state != "unfinished"]
  if not runs:
    raise UserError(f"runs/{name}: no finished run there")
  study.use_style()
  settings = {}
  for run in runs:
    settings.setdefault(run.name[:run.name.index("rotate=")].strip("_"), []).append(run)
  models = [study.by_rotation(of) for of in settings.values()]
  speeds = runner.measure_speed([next((run.directory for run in runs if run.state == "finished"), runs[0].directory)
                                 for groups in models for runs in groups.values()])
  page = study.Report(Path("runs", name), f"How much rotation: {name}")
  page.text("Mean and standard deviation over seeds, which change the initial weights and the order of the data. The difference to "
            "100 % is paired by seed, with the 95 % interval of Student's t: three seeds give a wide one, and an interval "
            "that holds 0 means that this sweep cannot tell the two apart. The logit is the largest |q.k|/sqrt(head size) "
            "of any layer, head and seed; the spike score is the share of steps whose loss lies more than 7 standard deviations above the "
            "rolling mean of 128 or 1,000 steps. Tokens per second and the time in RoPE were measured alone, after the runs.")
  if len(settings) > 1:
    page.heading("Validation loss less that of 100 %, ± 95 % interval")
    labels = list(dict.fromkeys(label for groups in models for label in groups if label != "100 %"))
    difference = lambda groups, label: study.interval_text(study.paired_difference(
        study.losses_of(groups.get(label, [])), study.losses_of(groups.get("100 %", []))))
    page.table("overview", ["setting", *labels], [[title(setting), *(difference(groups, label) for label in labels)]
                                                  for setting, groups in zip(settings, models)])
  for setting, groups in zip(settings, models):
    config, epochs = next(iter(groups.values()))[0].config, next(iter(groups.values()))[0].epochs
    key = setting.replace("=", "-").replace("_", "-")
    file = lambda kind: f"{key}-{kind}" if key else kind
    tokens = config["batch"] * config["context"] * config["accumulate"]
    page.heading(title(setting) or config["preset"])
    page.text(f"{config['layers']} layers x {config['width']}, {config['heads']} heads of {config['head_size']}, {config['block']} block, "
              f"context {config['context']}, {config['steps']:,} steps of {tokens:,} tokens, peak learning rate {config['lr']:g}, "
              f"on {config['data']}, which a run sees {number(epochs, 2)} times.")
    page.table(file("table"), HEADER, table(groups, speeds))
    figures = {
        "loss": ("Left: training loss, mean of the seeds and the band from the lowest to the highest. Right: the means less that of 100 %.",
                 study.plot_loss_curves, study.plot_loss_curve_difference),
        "fraction": ("Left: validation loss at the end, a mark per seed, the line through the means. Right: difference to 100 %, paired by "
                     "seed, with its 95 % interval.", study.plot_loss_by_fraction, study.plot_difference),
        "logits": ("Left: largest attention logit of all layers and heads. Right: norm of the gradient. A line per seed.",
                   study.plot_logits, study.plot_gradient_norms),
        "positions": ("Left: loss by position in the window. Right: the same less that of 100 %.", study.plot_loss_by_position,
                      lambda ax, groups: study.plot_loss_by_position(ax, groups, "100 %"))}
    for kind, (caption, left, right) in figures.items():
      figure, axes = study.plt.subplots(1, 2, figsize=(11, 4.2))
      left(axes[0], groups)
      right(axes[1], groups)
      page.figure(file(kind), figure, caption)
  page.write()


def work():
  args, passed = parse(sys.argv[1:])
  failed = []
  if not args.report:
    failed = runner.train_all(jobs_of(args, passed), args.jobs)
  report(args.name)
  return 1 if failed else 0


if __name__ == "__main__":
  runner.main(work)
