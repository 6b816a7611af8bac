"""Draw docs/images/throughput.png, the README's plot, from results/throughput/throughput.csv.

python docs/make_picture.py
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sftlab.paths import ROOT
from sftlab.tables import read_csv

TABLE = ROOT / "results" / "throughput" / "throughput.csv"
PICTURE = ROOT / "docs" / "images" / "throughput.png"
# Variant of the table, label, colour: at the same 20 rows a micro-batch.
BARS = (
    ("published loop, fp16", "a published loop, fp16", "#777777"),
    ("trl bf16", "trl, bf16", "#D55E00"),
    ("trl bf16, compiled", "trl, bf16, compiled", "#D55E00"),
    ("sft.py bf16, 20 rows", "sft.py, bf16", "#0072B2"),
)


def main() -> None:
    """Draw a bar a variant, with the lowest and highest turn."""
    rows = {row["variant"]: row for row in read_csv(TABLE)}
    figure, axes = plt.subplots(figsize=(8, 2.1), layout="constrained")
    for place, (variant, _, colour) in enumerate(BARS):
        median, *ends = (float(rows[variant][key]) for key in ("tokens_per_s", "lowest", "highest"))
        errors = [[abs(median - end)] for end in ends]
        axes.barh(place, median, color=colour, xerr=errors, error_kw={"linewidth": 1})
        axes.text(max(ends) + 900, place, f"{median:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(BARS)), [label for _, label, _ in BARS], fontsize=9)
    axes.set_title("Real tokens/s: 1B shape, LoRA r=16, 20 rows, one H200", fontsize=10, loc="left")
    axes.set_xlim(0, 105_000)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
