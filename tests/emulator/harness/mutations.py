"""Mutations of the kernels: one textual change each that the cases must notice.

`python -m harness.mutations [WORD ...]` tries those whose name has all words, each over a copy of the kernels; with
PYTHONPATH=tests:tests/emulator. The list of the other C++ sources is `mutants.native`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mutants.textual import Mutation

from harness import build

MUTATIONS = (
    Mutation("scan without its barrier", "block_scan.cuh", "block_sync();", "", 0),
    Mutation("scan without its closing barrier", "block_scan.cuh", "block_sync();", "", 1),
    Mutation("histogram not cleared before it is used", "select_pivot.cuh", "block_sync();", "", 0),
    Mutation("pivot read before it is found", "select_pivot.cuh", "block_sync();", "", 1),
    Mutation("blocks add before all are there", "select_cluster.cuh", "cluster.sync();", "", 0),
    Mutation("owners of bins as if there were two", "select_cluster.cuh", "run & (size - 1)", "run & 1"),
    Mutation("first scores of a row skipped", "select_keys.cuh", "return {begin - lead, end - begin, end - lead};",
             "return {begin, end - begin, end - lead};"),
    Mutation("clusters and dependent launches by the device, not by the code", "launch.h", "code.ptxVersion",
             "code.binaryVersion"),
    Mutation("occupancy asked of the launch's own attributes", "launch.h", ".cluster = grid.cluster},",
             ".cluster = grid.cluster, .dependent = device.clusters},"),
    Mutation("device remembered whatever the kernel's device", "launch.h",
             "{out.index, reinterpret_cast<const void*>(kernel)}", "{0, reinterpret_cast<const void*>(kernel)}"),
    Mutation("gather: offsets by plain loads", "find_row.cuh", "// The segment whose span holds",
             "inline int32_t load_relaxed(const int32_t* p) { return *p; }\n//"),
    Mutation("gather: tables by plain loads", "gather_warp.cuh", "to[i] = load_relaxed(&from[i]);",
             "to[i] = from[i];"),
    Mutation("gather: strides by plain loads", "find_row.cuh", "load_relaxed(&p->token)", "p->token"),
    Mutation("gather: tables read before they are there", "gather_warp.cuh", "block_sync();", ""),
    Mutation("gather: tables in shared memory whatever their size", "gather_warp.cuh", "return layers <= kTableInputs",
             "return true || layers <= kTableInputs"),
    Mutation("gather: warps go on before one has seen the flags", "gather.cu", "    block_sync();\n", ""),
    Mutation("gather: waits for the first segment alone", "gather_warp.cuh", "rows, end - 1)", "rows, first)"),
    Mutation("gather: behind a memset as if behind a select", "gather.cu", "p.source.rows() > 0, stream",
             "true, stream"),
    Mutation("gather: payloads as if all rows had one size", "gather_warp.cuh", "same ? end : rows", "end"),
    Mutation("gather: last payload left out", "gather_warp.cuh", "left < group ? left : group",
             "left < group ? left - 1 : group"),
    Mutation("sums read before all have added", "select_cluster.cuh", "cluster.sync();", "block_sync();", 1),
    Mutation("histogram added before it is counted", "select_cluster.cuh", "block_sync();", "", 1),
    Mutation("sums of the next turn not cleared", "select_cluster.cuh", "shared->sums[next][i] = 0;", "(void)next;"),
    Mutation("block counts read too early", "select_cluster.cuh", "cluster.sync();", "", 2),
    Mutation("block ends while its peers read", "select_cluster.cuh", "cluster.sync();", "block_sync();", 3),
    Mutation("flag set before the positions are written", "select_cluster.cuh", "cluster.sync();", "", 3),
    Mutation("warp counts read too early", "select_cluster.cuh", "block_sync();", "", 2),
    Mutation("select does not wait for the spans", "select_cluster.cuh", "grid_dependency_wait();", ""),
    Mutation("dependents released before the spans are done", "select_cluster.cuh",
             "grid_dependency_wait();\n  trigger_dependents();", "trigger_dependents();\n  grid_dependency_wait();"),
    Mutation("gather does not wait for the flag", "gather_warp.cuh",
             "while (load_acquire(&p.ready[row]) == 0) spin_pause();", ""),
    Mutation("gather ends before the select", "gather.cu", "grid_dependency_wait();", ""),
    Mutation("last rows of a warp skipped", "gather_warp.cuh", "base < end;", "base + 1 < end;"),
    Mutation("spans read before the tables are written", "spans.cu", "write_chunk(tables);\n  block_sync();",
             "write_chunk(tables);"),
    Mutation("registers: tiles behind them skipped", "select_keys.cuh",
             "source.from(kTiles * kWarpTile, slice, f);", ""),
    Mutation("shared: keys behind the capacity skipped", "select_keys.cuh", "source.from(capacity, slice, f);", ""),
    Mutation("last rows of a tile skipped", "rows_copy.cuh", "row < rows;", "row + 1 < rows;"),
    Mutation("compact: unit drawn before it is published", "compact.cu", "block_sync();\n    const uint32_t unit",
             "const uint32_t unit", suite="compact"),
    Mutation("compact: rows loaded before they are staged", "compact.cu",
             "    block_sync();\n    const int64_t row_bytes", "    const int64_t row_bytes", suite="compact"),
    Mutation("compact: published before all have loaded", "compact.cu", "block_sync();  // the whole slice", "// the",
             suite="compact"),
    Mutation("compact: stored before all have waited", "compact.cu", "block_sync();  // what the slice", "// what",
             suite="compact"),
    Mutation("compact: does not wait for the row in the way", "compact.cu", "if (waited != nullptr) {", "if (false) {",
             suite="compact"),
    Mutation("compact: waits for the first slice alone", "compact.cu",
             "< progress) spin_pause();", "== 0) spin_pause();", suite="compact"),
    Mutation("compact: published before it is loaded", "compact.cu", "smaller(slice + lanes, vectors) * kStep",
             "vectors * kStep", suite="compact"),
    Mutation("compact: tickets in the same order to the back", "compact.cu", "p.to_back ? tiles - 1 - turn : turn",
             "turn", suite="compact"),
    Mutation("compact: nobody is in the way to the back", "compact.cu", "p.to_back ? j + 1 : begin",
             "p.to_back ? end : begin", suite="compact"),
    Mutation("compact: flags and tickets not cleared", "compact.cu",
             "status = cudaMemsetAsync(flags, 0, (1 + units) * sizeof(uint32_t), stream);", "", suite="compact"),
    Mutation("compact: pages beyond the pool", "lkv/segments.h", "page >= pages->count", "page > pages->count",
             suite="compact"),
    Mutation("compact: free pages of the first tables alone", "compact_fill.cuh", "i < tables; i += int64_t{",
             "i < 1; i += int64_t{", suite="compact"),
    Mutation("compact: all payloads through the first table", "lkv/segments.h", "nullptr : p.pages + payload",
             "nullptr : p.pages", suite="compact"),
    Mutation("fill: listed before the list is empty", "compact_fill.cuh", "block_sync();", "", 0, "compact"),
    Mutation("fill: copied before the list is complete", "compact_fill.cuh", "block_sync();", "", 1, "compact"),
    Mutation("fill: emptied while others read the list", "compact_fill.cuh", "block_sync();", "", 2, "compact"),
    Mutation("fill: warps list in one place", "compact_fill.cuh", "first = __shfl_sync(kFullWarp, first, 0);",
             "first = 0;", suite="compact"),
    Mutation("fill: alignment of the first warp alone", "compact_fill.cuh",
             "for (const uint32_t more : shared->bits) bits |= more;", "bits |= shared->bits[0];", suite="compact"),
    Mutation("fill: holes counted as if all rows were in place", "lkv/segments.h", "to.count + below - i - 1",
             "to.count - i - 1", suite="compact"),
    Mutation("fill: slack not written", "compact_fill.cuh", "if (payload == 0) p.filled[j]",
             "if (payload == 0 && row >= 0) p.filled[j]", suite="compact"),
    Mutation("fill: positions beyond the segment move", "compact_fill.cuh", " && position < segment.limit", "",
             suite="compact"),
    Mutation("ready flags not cleared", "lkv/segments.h", "p.ready[row] = 0;", "p.ready[row] = p.ready[row];"),
    Mutation("ties from the end", "select_pivot.cuh", "is_tie && ties < pivot.need", "is_tie && ties <= pivot.need"),
    Mutation("keys behind a slice kept", "select_pivot.cuh", "const bool is_greater = i + k < slice.end && ",
             "const bool is_greater = "),
    Mutation("split: histogram added too early", "select_split.cuh", "block_sync();", "", 0),
    Mutation("split: flag set before the block has written", "select_split.cuh", "block_sync();", "", 1),
    Mutation("upload without its tail", "spans.cu", "i < chunk.bytes; i += blockDim.x",
             "i < copied; i += blockDim.x"),
    Mutation("append: length written while others read it", "append.cu", "block_sync();", "", suite="append"),
    Mutation("append: length counts what was dropped", "lkv/segments.h", "span.length + fit}", "span.length + valid}",
             suite="append"),
    Mutation("append: last positions not written", "append.cu", "i < added.rows;", "i + 1 < added.rows;",
             suite="append"),
    Mutation("attend: queries used before they are found", "attend_kernels.cuh", "block_sync();", "", 0, "attend"),
    Mutation("attend: sums written while others read the tile", "attend_kernels.cuh", "block_sync();", "", 1, "attend"),
    Mutation("attend: sums of the teams read too early", "attend_kernels.cuh", "block_sync();", "", 2, "attend"),
    Mutation("attend: K read before it is staged", "attend_kernels.cuh", "block_sync();", "", 3, "attend"),
    Mutation("attend: logits read too early", "attend_kernels.cuh", "block_sync();", "", 4, "attend"),
    Mutation("attend: V read before it is staged", "attend_kernels.cuh", "block_sync();", "", 5, "attend"),
    Mutation("attend: tile overwritten while others read it", "attend_tile.cuh", "block_sync();", "", 0, "attend"),
    Mutation("attend: causal limit one row late", "attend_kernels.cuh", "p.queries - 1 - i / p.group",
             "p.queries - 2 - i / p.group", suite="attend"),
    Mutation("attend: last row of a piece skipped", "attend_tile.cuh", "row < seen", "row + 1 < seen", suite="attend"),
    Mutation("attend: tail of the columns not cleared", "attend_tile.cuh", "column % kItems != 0", "false",
             suite="attend"),
    Mutation("attend: unseen rows add what they hold", "attend_tile.cuh", "if (weights[i][j] == 0.0f) continue;", "",
             suite="attend"),
    Mutation("attend: sums not scaled to a higher logit", "attend_tile.cuh", "acc[chunk][i][c] *= factor;",
             "(void)factor;", suite="attend"),
    Mutation("attend: sinks in every piece", "attend_kernels.cuh", "u.piece > 0 ||", "", suite="attend"),
    Mutation("attend: sink without a row", "attend_kernels.cuh", "|| shared->end[q] == 0", "", suite="attend"),
    Mutation("attend: sinks of the first tile", "attend_kernels.cuh", "p.sinks, query_head(p, u.row, int64_t{u.tile}",
             "p.sinks, query_head(p, u.row, int64_t{0}", suite="attend"),
    Mutation("attend: sums not scaled to a higher sink", "attend_kernels.cuh", "acc *= shared->factor[q];", "",
             suite="attend"),
    Mutation("attend: V read as of K's type", "attend_kernels.cuh", "p.v_type", "p.k_type", suite="attend"),
    Mutation("attend: queries read as of the tile's type", "attend_kernels.cuh", "kMixed ? p.type : type", "type",
             suite="attend"),
    Mutation("attend: last piece not merged", "attend_kernels.cuh", "piece < pieces; ++piece) {",
             "piece + 1 < pieces; ++piece) {", suite="attend"),
    Mutation("soft top-k: sums of the warps read too early", "soft_topk_row.cuh",
             "block_sync();\n    if (threadIdx.x <", "if (threadIdx.x <", suite="soft_topk"),
    Mutation("soft top-k: sums of the blocks read too early", "soft_topk_row.cuh", "SoftCluster::sync();", "",
             suite="soft_topk"),
    Mutation("soft top-k: sums overwritten while peers read", "soft_topk_row.cuh", "blocks[round & 1]", "blocks[0]",
             suite="soft_topk"),
    Mutation("soft top-k: plan read before it is made", "soft_topk_row.cuh", "block_sync();\n}", "}",
             suite="soft_topk"),
    Mutation("soft top-k: tau read before it has moved", "soft_topk_kernels.cuh", "block_sync();", "",
             suite="soft_topk"),
    Mutation("soft top-k: block ends while its peers read", "soft_topk_kernels.cuh", "SoftCluster::sync();", "",
             suite="soft_topk"),
    Mutation("soft top-k: last score of a slice skipped", "soft_topk_kernels.cuh", "i < plan.end;",
             "i + 1 < plan.end;", 1, "soft_topk"),
    Mutation("soft top-k: mask behind the length not written", "soft_topk_kernels.cuh", "mask[i] = missing;",
             "(void)missing;", suite="soft_topk"),
    Mutation("soft top-k: mean read before it is known", "soft_topk_grad.cuh", "block_sync();", "", suite="soft_topk"),
    Mutation("soft top-k: gradient ends while its peers read", "soft_topk_grad.cuh", "SoftCluster::sync();", "",
             suite="soft_topk"),
)  # fmt: skip


def apply(mutation: Mutation, kernels: Path) -> None:
    """Writes the mutated file into a copy of the kernels and of the headers that they share with the CPU's, and takes
    back whatever was mutated there before."""
    originals = {path.name: path for path in build.KERNELS.iterdir()}
    originals |= {str(path.relative_to(build.HEADERS)): path for path in build.HEADERS.rglob("*.h")}
    for name, original in originals.items():
        text = original.read_text()
        if name == mutation.file:
            text = mutation.apply(text)
        copy = kernels / name
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    for path in kernels.rglob("*"):  # of an earlier state of the sources
        if path.is_file() and str(path.relative_to(kernels)) not in originals:
            path.unlink()


def caught_by(mutation: Mutation, cases: int = 60) -> str | None:
    """The schedule under which the mutated kernels fail, and how, where plain loads may return old values; None if they
    pass all cases."""
    kernels = build.build_root() / "mutated_kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    with build.locked(kernels.with_suffix(".lock")):
        apply(mutation, kernels)
        folder = build.build("mutated", "kernels", weak=True, kernels=kernels)
        for schedule in reversed(build.SCHEDULES):
            done = build.run_cases(folder, mutation.suite or "evict", 0, cases, (schedule,), 0, sanitize=False)
            if done.returncode != 0:
                lines = done.stderr.splitlines() or [f"ended by signal {-done.returncode}"]
                return f"{schedule}: {lines[0]}"
    return None


if __name__ == "__main__":
    for each in MUTATIONS:
        if not all(word in each.name for word in sys.argv[1:]):
            continue
        print(f"{each.name:50} {caught_by(each) or 'NOT CAUGHT'}", flush=True)
