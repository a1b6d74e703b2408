"""From the JSON of a run to the README's table and a plot.

python bench/report.py                            prints the tables of bench/results/cpu-*.json and draws a plot of each
python bench/report.py run1.json run2.json        medians over several processes on one machine, on one instruction set
python bench/report.py --readme README.md         replaces what stands between its two markers: a row for each set
python bench/report.py --page docs/benchmarks.md  the same with all tables and plots
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from prediction import GPUS, has_planner
from results import Result, Run, merge
from sets import SETS
from targets import BEST, CPU_TARGETS, CUB, GPU_TARGETS, Target

HERE = Path(__file__).parent
SETS_CAPTION = (
    "The kernels of each instruction set (`LKV_CPU_ISA`), beside rivals limited to the same one, with budgets in an "
    "int32 tensor:"
)
MARK = "bench"

# The rivals of each column; where a result has several of them, the fastest counts.
COLUMNS = {
    "naive PyTorch": ("naive", "torch.gather", "topk"),
    "best PyTorch": (*BEST, "best batched", "best out=", "best, copied back", "index_select", "unsorted, then sort"),
    "per-head loop": ("loop",),
    "torch.compile": ("torch.compile",),
    "FlashInfer": ("flashinfer",),
    "Triton": ("triton",),
    "CUB": (*CUB, *(name.removesuffix(", our gather") for name in CUB)),
    "one block per head": ("one block per head",),
    "evict, uniform": ("uniform",),
    "SDPA, all rows": ("dense",),
    "SDPA, padded": ("padded",),
    "evict per layer": ("evict per layer",),
    "evict": ("evict", "evict out="),
    "evict_, in order": ("ascending",),
    "evict_, to the front": ("front", "in place"),
    "head after head": ("head by head",),
}
HEADLINE = ("evict", "evict_", "select", "gather", "evict_layers 16", "evict_layers 32", "attend")


def headline(run: Run) -> list[Result]:
    """The sweep over L at the usual retention, skewed budgets, and the relaxation that budgets are learnt with."""
    usual = [r for r in run.results if r.op in HEADLINE and " bf16 15%" in r.shape and ", 128]" in r.shape]
    soft = [r for r in run.results if r.op.startswith("soft_topk")]
    return [r for r in usual if "[1, 8," in r.shape and "scores" not in r.shape] + soft


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    titles = list(head)
    top = f"| {' | '.join(titles)} |".replace("|  |", "| |")
    return "\n".join([top, "|---" * len(titles) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def speed_table(run: Run, rows: list[Result]) -> str:
    """Time, rate, share of memcpy, and the time of every rival over ours."""
    columns = {name: keys for name, keys in COLUMNS.items() if any(key in r.ratios for r in rows for key in keys)}

    def cells(r: Result) -> Iterator[str]:
        yield from (f"`{r.op}`", r.mode, r.shape, _time(r.us or 0), "" if r.gbps is None else f"{r.gbps:.1f}")
        yield _memcpy(r)
        yield from (_fastest(r, keys) for keys in columns.values())

    return table(("op", "", "shape", "time", "GB/s", "of memcpy", *columns), map(cells, rows))


def in_place(run: Run) -> str:
    """Evictions in place, by end, order and memory."""
    rows = [r for r in run.results if r.op.startswith(("evict_ ", "evict_paged_"))]
    return speed_table(run, rows) if rows else ""


def ceilings(run: Run) -> str:
    """How fast a gather alone moves rows, by how they lie."""
    rows = [
        (r.op.removeprefix("ceiling "), r.shape, f"{r.gbps:.0f}", _memcpy(r))
        for r in run.results
        if r.op.startswith("ceiling ") and r.gbps
    ]
    return table(("rows of a gather", "", "GB/s", "of memcpy"), rows) if rows else ""


def targets_table(run: Run) -> str:
    """Every target, what was measured, met or missed; on a GPU beside the prediction."""
    if run.device == "cpu":
        rows = [(t.name, t.limit, *_verdict(t, run)) for t in CPU_TARGETS]
        return table(("target", "bound", "measured", ""), rows)
    name = str(run.machine.get("gpu", ""))
    gpu = next((gpu for short, gpu in GPUS.items() if short.upper() in name and has_planner()), None)
    rows = []
    for t in GPU_TARGETS:
        found = t.measure(run)
        rows.append((t.name, t.limit, t.show(gpu and t.predict(gpu)), *_verdict(t, run), found.case if found else ""))
    head = f"Targets are of an H200; this is one {name}. Predictions are of bench/model.py."
    return f"{head}\n\n{table(('target', 'bound', 'predicted', 'measured', '', ''), rows)}"


def sets_table(runs: Iterable[Run]) -> str:
    """A row for each instruction set, where it was measured, and the targets that have a short name."""
    named = [target for target in CPU_TARGETS if target.short]
    rows = []
    for run in runs:
        m = run.machine
        where = f"{m['cpu']}, {m['threads']} threads, {str(m['date']).split()[0]}"
        found = (_verdict(target, run) for target in named)
        rows.append((m["cpu_isa"], where, *(value + " (missed)" * ("missed" in word) for value, word in found)))
    return table(("", "measured on", *(target.short for target in named)), rows)


def _verdict(target: Target, run: Run) -> tuple[str, str]:
    """What was measured, and what that says of the target."""
    found = target.measure(run)
    verdict = "not measured" if found is None else target.verdict(found.value)
    return target.show(found and found.value), verdict if target.promised(run) else "no promise"


def _fastest(result: Result, rivals: Iterable[str]) -> str:
    found = [result.ratios[rival] for rival in rivals if rival in result.ratios]
    return f"{min(found):.2f}x" if found else ""


def _memcpy(result: Result) -> str:
    return f"{100 * result.ratios['memcpy']:.0f} %" if "memcpy" in result.ratios else ""


def caption(run: Run) -> str:
    m = run.machine
    place = m.get("gpu") or f"{m['cpu']}, {m.get('cpu_isa')}, {m['threads']} threads"
    processes = f", medians over {m['processes']} processes" if "processes" in m else ""
    modes = {
        "cpu": "Fresh: the call allocates its result. Warm: it writes into memory that is there already (`out=`).",
        "cuda": (
            "Cold: the L2 cache is overwritten before each call. Graph: the same of a CUDA graph. "
            "Warm: a CUDA graph, cache as it was left."
        ),
    }[run.device]
    return (
        f"{place}, torch {m['torch']}, {m['date']}{processes}. Shapes are `[B, H, L, D]`. {modes} "
        "Columns of rivals have their time over ours; of memcpy: its time for the bytes of the output, into memory "
        "allocated the same way, over ours."
    )


def markdown(run: Run) -> str:
    parts = [caption(run), speed_table(run, headline(run)), in_place(run), ceilings(run), targets_table(run)]
    return "\n\n".join(filter(None, parts))


def page(runs: dict[Path, Run]) -> str:
    """All tables and plots, a section for each instruction set."""
    sections = []
    for path, run in runs.items():
        title = run.machine.get("gpu") or run.machine["cpu_isa"]
        plot = f"![Time of an eviction against the length of the cache](benchmarks/{path.with_suffix('.png').name})"
        sections.append(f"## {title}\n\n{markdown(run)}\n\n{plot}")
    return "\n\n".join(sections)


def replace_between_markers(path: Path, text: str, mark: str = MARK) -> None:
    first, last = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, begin, rest = path.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{path}: expected the lines {first} and {last}")
    path.write_text(f"{before}{first}\n{text}\n{last}{after}")


def _time(us: float) -> str:
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="default: the last run of each instruction set")
    parser.add_argument("--readme", type=Path, help="file with the two markers")
    parser.add_argument("--page", type=Path, help="file with the two markers, plots beside it in benchmarks/")
    parser.add_argument("--write", type=Path, help="also write the merged run as JSON")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()

    if args.runs:
        runs = {args.write or args.runs[0]: merge([Run.read(path) for path in args.runs])}
    else:
        paths = [HERE / "results" / f"cpu-{isa}.json" for isa in SETS]
        runs = {path: Run.read(path) for path in paths if path.exists()}
    plots = args.page.parent / "benchmarks" if args.page else HERE / "results"
    for path, run in runs.items():
        if args.write:
            run.write(args.write)
        if not args.no_plot:
            from plot import draw

            plots.mkdir(exist_ok=True)
            draw(run, plot := plots / path.with_suffix(".png").name)
            print(f"plot in {plot}\n")
        print(markdown(run))
    if args.readme:
        replace_between_markers(args.readme, f"{SETS_CAPTION}\n\n{sets_table(runs.values())}")
    if args.page:
        replace_between_markers(args.page, page(runs))


if __name__ == "__main__":
    main()
