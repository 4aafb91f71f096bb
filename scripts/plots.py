"""One look for every plot: `import plots` sets it, and plots.COLOURS is its palette.

The palette is Okabe and Ito's and a grey, which the colour-blind tell apart; lines also differ in their dashes, so that
a copy in black and white can be read. Figures are 6.3 inches wide, the text of an A4 page.
"""
import matplotlib.pyplot as plt
from cycler import cycler

COLOURS = BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, GREY = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
DASHES = ["-", "--", "-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1))]

PIXELS_PER_INCH = 100  # of a figure in a page; its file has "savefig.dpi"

plt.rcParams.update({
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES),
    "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.88", "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 4, "image.cmap": "cividis",
    "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False,
    "figure.figsize": (6.3, 3), "figure.dpi": 120, "figure.constrained_layout.use": True, "savefig.dpi": 240,
})
