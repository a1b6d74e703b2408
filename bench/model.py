"""The predictions of bench/prediction.py for every target of a GPU that has a model.

python bench/model.py                     a Markdown table for an H200
python bench/model.py --gpu h100 --json   for an H100, with all that a prediction is made of
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

from prediction import GPUS, Gpu, Prediction, Work, predict
from shapes import Shape
from targets import GPU_TARGETS, TIMED, microseconds


def works() -> dict[str, Work]:
    """The calls that have a prediction."""
    skewed = {f"evict, L={length}, skewed": Work(Shape(length, skewed=True)) for length in (8192, 131072)}
    return {**{target.name: target.work for target in TIMED}, **skewed}


def predictions(gpu: Gpu) -> str:
    """Markdown: the prediction of every target."""
    lines = [
        f"Predictions for one {gpu.name}, not measurements. Bounds are of an H200.",
        "",
        "| target | bound | predicted | rows at 95 to 80 % | floor | launches, select, gather | how | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target in GPU_TARGETS:
        value = target.predict(gpu)
        if value is None:
            lines.append(f"| {target.name} | {target.limit} | no model | | | | | |")
            continue
        low, high = (target.predict(replace(gpu, row_share=share)) for share in (0.95, 0.8))
        between = f"{microseconds(low)} to {microseconds(high)} us" if target.unit == "us" else ""
        parts = _parts(predict(gpu, target.work)) if target.work else ("", "", "")
        cells = [target.name, target.limit, target.show(value), between, *parts, target.verdict(value)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parts(made: Prediction) -> tuple[str, str, str]:
    plan = made.plan
    waves = f", {plan.waves} waves" if plan.waves > 1 else ""
    how = f"{plan.launches} launches, {plan.clusters} x {plan.cluster} blocks{waves}, keys in {plan.keys_in}"
    parts = ", ".join(map(microseconds, (made.launch_us, made.select_us, made.gather_us)))
    return f"{microseconds(made.floor_us)} us", parts, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--json", action="store_true", help="every prediction with its parts and its launch")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    if args.json:
        found = {name: asdict(predict(gpu, work)) for name, work in works().items()}
        print(json.dumps({"gpu": asdict(gpu), "predictions": found}, indent=1))
    else:
        print(predictions(gpu))


if __name__ == "__main__":
    main()
