"""The predictions of bench/prediction.py for every target of a GPU that has a model.

python bench/model.py                     a Markdown table for an H200
python bench/model.py --gpu h100 --json   for an H100, with all that a prediction is made of
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

from prediction import GPUS, Gpu, predict
from report import table
from shapes import Shape
from targets import GPU_TARGETS, TIMED, Target, microseconds


def works() -> dict[str, tuple[Shape, str]]:
    """The calls that have a prediction: what and of which op."""
    skewed = {f"evict, L={length}, skewed": (Shape(length, skewed=True), "evict") for length in (8192, 131072)}
    return {**{target.name: (target.shape, target.op) for target in TIMED}, **skewed}


def predictions(gpu: Gpu) -> str:
    """Markdown: the prediction of every target."""
    head = ("target", "bound", "predicted", "rows at 95 to 80 %", "floor", "launches, select, gather", "how", "")
    return f"Predictions for one {gpu.name}, not measurements. Bounds are of an H200.\n\n" + table(
        head, (_row(gpu, target) for target in GPU_TARGETS)
    )


def _row(gpu: Gpu, target: Target) -> tuple[str, ...]:
    value = target.predict(gpu)
    if value is None:
        return target.name, target.limit, "no model", "", "", "", "", ""
    between = floor = parts = how = ""
    if target.shape is not None:
        low, high = (target.predict(replace(gpu, row_share=share)) for share in (0.95, 0.8))
        between = f"{microseconds(low)} to {microseconds(high)} us"
        made = predict(gpu, target.shape, target.op)
        plan, floor = made.plan, f"{microseconds(made.floor_us)} us"
        parts = ", ".join(map(microseconds, (made.launch_us, made.select_us, made.gather_us)))
        waves = f", {plan.waves} waves" if plan.waves > 1 else ""
        how = f"{plan.launches} launches, {plan.clusters} x {plan.cluster} blocks{waves}, keys in {plan.keys_in}"
    return target.name, target.limit, target.show(value), between, floor, parts, how, target.verdict(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--json", action="store_true", help="every prediction with its parts and its launch")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    if args.json:
        found = {name: asdict(predict(gpu, *work)) for name, work in works().items()}
        print(json.dumps({"gpu": asdict(gpu), "predictions": found}, indent=1))
    else:
        print(predictions(gpu))


if __name__ == "__main__":
    main()
