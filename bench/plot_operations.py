"""Draws where the time of a training step goes, from the JSON that build/bench --json printed.

    build/bench ... --json >before.json     (and again after a change)
    build-python/bin/python bench/plot_operations.py docs/speed.png before=before.json after=after.json

A bar is a step, its operations timed one by one. One that works in a product's epilogue counts as that product.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))
sys.dont_write_bytecode = True
import plots  # noqa: E402
from plots import plt  # noqa: E402

GROUPS = {"linear": "products", "attention": "attention", "cross": "loss", "swiglu": "SwiGLU", "norm": "norms",
          "rope": "RoPE", "adamw": "AdamW"}  # by the first word of an operation's name


def main():
    if len(sys.argv) < 3 or any("=" not in word for word in sys.argv[2:]):
        sys.exit(__doc__)
    steps = {}
    for word in sys.argv[2:]:
        label, path = word.split("=", 1)
        steps[label] = dict.fromkeys([*GROUPS.values(), "the rest"], 0)
        for name, seconds in json.loads(pathlib.Path(path).read_text())["operation_seconds"].items():
            steps[label][GROUPS.get(name.split("_")[0], "the rest")] += 1e3 * seconds
    figure, axes = plt.subplots(figsize=(6.3, 1.3 + 0.4 * len(steps)))
    left = [0.0] * len(steps)
    for group, color in zip([*GROUPS.values(), "the rest"], plots.COLOURS):
        widths = [step[group] for step in steps.values()]
        bars = axes.barh(list(steps), widths, left=left, color=color, label=group)
        axes.bar_label(bars, [f"{w:.1f}" if w > 2 else "" for w in widths], label_type="center", color="white", fontsize=7)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_xlabel("ms of a step")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(ncols=4, loc="outside upper center")
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
