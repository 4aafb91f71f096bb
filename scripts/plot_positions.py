"""Draws what `eval positions` and `eval length` write: loss by position, a line for each file and window length.

    build/eval length --run nano --out nano.csv
    build-python/bin/python scripts/plot_positions.py nano.csv nope.csv --out length.svg     (make build-python/ready)
"""

import argparse
import csv
import pathlib

import matplotlib.pyplot as plt

import plots  # noqa: F401  the look


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", default="positions.svg", help="its ending says the format: .svg, .png, .pdf")
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, path in enumerate(options.files):
        with open(path) as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        contexts = sorted({row["context"] for row in rows})
        for context, width in zip(contexts, (1, 1.6, 2.4, 3.4)):
            bins = [row for row in rows if row["context"] == context]
            # A bin stands at its middle, positions counted from 1 for the logarithm.
            axes.errorbar([(row["begin"] + 1 + row["end"]) / 2 for row in bins], [row["loss"] for row in bins],
                          [row["stderr"] for row in bins], color=f"C{color}", linewidth=width, elinewidth=1,
                          label=f"{pathlib.Path(path).stem}, {context:.0f}")
        axes.axvline(contexts[0], color=f"C{color}", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the window, from 1 (dotted: the training context)", ylabel="loss, nats per token")
    axes.legend(title="model, window")
    figure.savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
