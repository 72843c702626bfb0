"""Draw the learning rate of every recipe in configs/, step by step, as its own plan says it.

python scripts/recipe_rates.py docs/pictures/recipe_rates.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llm_training_toolkit.config import load_config
from llm_training_toolkit.plan import LRSchedule, make_plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ASSUMED = 1000
"""Steps of a recipe that gives its length in epochs of documents that are not here."""
COLUMNS = 4


def schedule_of(path: Path) -> tuple[LRSchedule, bool]:
    """The schedule of a recipe, and whether the file itself says how many steps there are."""
    config = load_config(path)
    plan = make_plan(config)
    if plan.steps is not None:
        return plan.build_lr_schedule(), True
    train = config.train.model_copy(update={"steps": ASSUMED, "epochs": None})
    return make_plan(config.model_copy(update={"train": train})).build_lr_schedule(), False


def draw(axis: Any, name: str, schedule: LRSchedule, *, known: bool) -> None:
    """One recipe: rate over steps, with its peak and its last rate in words."""
    rates = [schedule.compute_lr(step) for step in range(schedule.steps)]
    axis.plot(range(1, schedule.steps + 1), rates, color="#2b6cb0", linewidth=1.6)
    axis.fill_between(range(1, schedule.steps + 1), rates, color="#2b6cb0", alpha=0.08)
    length = f"{schedule.steps:,} steps" if known else "length in epochs"
    axis.set_title(f"{name}\n{schedule.kind}, {max(rates):g} to {rates[-1]:g}; {length}", fontsize=7.5, loc="left")
    axis.set_xlim(0, schedule.steps)
    axis.set_ylim(0, schedule.peak * 1.08)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.yaxis.get_offset_text().set_visible(False)
    axis.set_yticks([0, schedule.peak])
    axis.set_yticklabels(["0", f"{schedule.peak:g}"])
    axis.set_xticks([0, schedule.warmup_steps, schedule.steps])
    axis.set_xticklabels(["", f"{schedule.warmup_steps:,}", f"{schedule.steps:,}"])
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw all recipes into one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    recipes = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "search")
    rows = -(-len(recipes) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, 1.75 * rows), layout="constrained", squeeze=False)
    for axis, path in zip(axes.flat, recipes, strict=False):
        schedule, known = schedule_of(path)
        draw(axis, str(path.relative_to(CONFIGS)), schedule, known=known)
    for axis in axes.flat[len(recipes) :]:
        axis.set_visible(False)
    figure.savefig(arguments.picture, dpi=110)
    print(arguments.picture)


if __name__ == "__main__":
    main()
