"""What evict and select should take on a Hopper GPU, from bytes, launches, occupancy and latencies.

    python bench/model.py                     a Markdown table of every target that has a model, for an H200
    python bench/model.py --gpu h100 --json   for an H100, with all that a prediction is made of

All times are predictions, not measurements. They are sums over one path through csrc/cuda (select_plan.h, evict.cu,
gather.cu) and know nothing of instruction schedules, bank conflicts beyond an average, or the memory controller. What
the constants are taken from stands beside them; expect errors of a quarter below 20 us, where latencies and launches
are all there is, and of a tenth above 100 us, where the rate of gathering 256-byte rows is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from math import ceil

from cards import GPUS, Gpu, Kernel, round_up
from shapes import Shape

# Of csrc/cuda: sizes and limits of select_plan.h, evict.cu and gather_tile.h; registers as bench/resources.py finds
# them for sm_90.
SELECT_FIXED = 20784  # ClusterShared<512>: a histogram of 2048 bins, three half ones for sums, and a little more
TILE_SHARED = 4192  # TileShared: where 64 rows of four payloads lie, and their strides
SELECT_WARPS, SELECT_REGISTERS = 16, 55
GATHER = Kernel(threads=512, registers=52, shared=TILE_SHARED)
FOR_GATHER = 16 << 10  # shared memory that a select leaves to it
WARP_TILE, REGISTER_TILES, SHORT_PART, SHORT_ROW, MAX_CLUSTER = 128, 2, 256, 16384, 16
FUSED_BYTES, TILE_ROWS, CHUNK_BYTES = 32 << 10, 64, 3456
BINS, AHEAD = 2048, 2  # bins of a round; tiles that a warp loads ahead
# Throughput of a multiprocessor, in keys per cycle: estimates.
COUNTED = 8  # into a histogram: four lanes of a warp meet in a bank
VISITED = 10  # compared and found to lie elsewhere
EMITTED = 6  # with the shuffles of a scan and the stores
ROUND_CYCLES = 450  # clearing and searching the bins: six barriers and a scan by 512 threads
ROOMS_US = 0.9  # the grid of one block that lays out rooms: a scan between loads and stores


@dataclass(frozen=True)
class Work:
    """One call: a shape, in how many layers, evict or only select."""

    shape: Shape
    layers: int = 1
    op: str = "evict"

    @property
    def rows(self) -> int:
        """Row sets: heads of all sequences and layers."""
        return self.layers * self.shape.batch * self.shape.heads

    @property
    def score_bytes(self) -> int:
        return self.layers * self.shape.score_bytes

    @property
    def output_bytes(self) -> int:
        return self.layers * self.shape.output_bytes if self.op == "evict" else 0

    @property
    def moved_bytes(self) -> int:
        """Scores once; kept rows once in and once out. Positions are left out, as they stay in L2."""
        return self.score_bytes + 2 * self.output_bytes

    @property
    def table_bytes(self) -> int:
        """Arguments that travel with launches: strides of every layer, its tokens, ragged budgets."""
        budgets = 8 * len(self.shape.per_row) * self.layers if self.shape.skewed else 0
        return self.layers * (8 + 3 * 32) + 32 + budgets


@dataclass(frozen=True)
class Plan:
    """How a call is launched, as csrc/cuda chooses it."""

    fused: bool  # one launch that selects and gathers
    cluster: int  # blocks per row set
    clusters: int  # that run at once
    waves: int  # row sets that one cluster works on, at most
    keys: int  # of one block
    keys_in: str  # "registers", "shared" or "memory"
    per_multiprocessor: int  # select blocks that would fit
    gather_blocks: int  # per multiprocessor, beside a select block (fused: the same blocks)
    launches: int

    @property
    def blocks(self) -> int:
        return self.cluster * self.clusters


def keys_per_warp(length: int, cluster: int) -> int:
    return round_up(ceil(length / (cluster * SELECT_WARPS)), WARP_TILE)


def make_plan(gpu: Gpu, work: Work) -> Plan:
    cluster = _select_cluster(gpu, work)
    fused = _with_cluster(gpu, work, cluster, fused=True)
    blocks = min(work.rows * fused.cluster, gpu.multiprocessors)
    fits = fused.keys_in == "registers" and work.output_bytes <= blocks * FUSED_BYTES
    if work.op == "evict" and fits:
        return fused
    return _with_cluster(gpu, work, cluster, fused=False)


def _in_shared(gpu: Gpu, fixed: int) -> int:
    """Keys that a warp has shared memory for."""
    room = gpu.shared_per_block - FOR_GATHER - fixed
    return room // (4 * SELECT_WARPS) // WARP_TILE * WARP_TILE


def _select_cluster(gpu: Gpu, work: Work) -> int:
    """Blocks are added until keys fit on chip, and further while multiprocessors would idle."""
    length, in_registers = work.shape.length, REGISTER_TILES * WARP_TILE
    most = in_registers if length <= SHORT_ROW else _in_shared(gpu, SELECT_FIXED)
    cluster = 1
    while cluster < MAX_CLUSTER:
        part = keys_per_warp(length, cluster)
        if part <= most and (part <= SHORT_PART or work.rows * cluster * 2 > gpu.multiprocessors):
            break
        cluster *= 2
    return cluster


def _with_cluster(gpu: Gpu, work: Work, cluster: int, fused: bool) -> Plan:
    fixed = SELECT_FIXED + (TILE_SHARED if fused else 0)
    part = keys_per_warp(work.shape.length, cluster)
    room, registers = _in_shared(gpu, fixed), REGISTER_TILES * WARP_TILE
    keys_in = "registers" if part <= registers else "shared" if part <= room else "memory"
    select = Kernel(
        threads=32 * SELECT_WARPS,
        registers=SELECT_REGISTERS,
        shared=fixed + (0 if keys_in == "registers" else 4 * SELECT_WARPS * min(part, room)),
    )
    fit = select.per_multiprocessor(gpu)
    active = sum(group * fit // cluster for group in gpu.groups)
    if cluster > 8 and active < work.rows and keys_per_warp(work.shape.length, cluster // 2) <= room:
        return _with_cluster(gpu, work, cluster // 2, fused)  # all row sets at once, by smaller clusters
    # A select leaves half of every multiprocessor to the gather that waits for it.
    wanted = gpu.multiprocessors * (1 if work.op == "evict" else 2) // cluster
    clusters = max(1, min(work.rows, wanted, active))
    chunks = ceil(work.table_bytes / CHUNK_BYTES)
    return Plan(
        fused=fused,
        cluster=cluster,
        clusters=clusters,
        waves=ceil(work.rows / clusters),
        keys=min(ceil(work.shape.length / cluster), part * SELECT_WARPS),
        keys_in=keys_in,
        per_multiprocessor=fit,
        gather_blocks=1 if fused else GATHER.per_multiprocessor(gpu, beside=select),
        launches=chunks + 1 + (work.op == "evict" and not fused),
    )


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one call in a CUDA graph with a cold L2 cache, predicted.

    `total_us` is less than the sum of its parts where gather and select run beside each other.
    """

    floor_us: float  # all bytes at the rate of a contiguous copy
    select_us: float
    gather_us: float
    launch_us: float
    total_us: float
    bound_by: str  # which of select, gather and launches takes the most
    plan: Plan


def predict(gpu: Gpu, work: Work) -> Prediction:
    plan = make_plan(gpu, work)
    wave = _select_wave_us(gpu, work, plan)
    select = plan.waves * wave
    launch = gpu.launch_us + ROOMS_US + (ceil(work.table_bytes / CHUNK_BYTES) - 1) * gpu.gap_us + gpu.dependent_us
    gather = 0.0
    total = launch + select
    if work.op == "evict":
        gather = _fused_gather_us(gpu, work, plan) if plan.fused else _gather_us(gpu, work, plan)
        # The gather of a wave runs beside the selects of those behind it.
        total = launch + (select + gather if plan.fused else max(wave + gather, select + gather / plan.waves))
    parts = {"launches": launch, "select": select, "gather": gather}
    floor = work.moved_bytes / gpu.copy_rate / 1e3
    return Prediction(floor, select, gather, launch, total, max(parts, key=lambda part: parts[part]), plan)


def _select_wave_us(gpu: Gpu, work: Work, plan: Plan) -> float:
    """One row set by one cluster, while as many as run at once do the same."""
    itemsize = work.shape.score_dtype.itemsize
    rounds = 3 if itemsize == 4 else 2
    beside = ceil(plan.blocks / gpu.multiprocessors)  # blocks that share a multiprocessor
    ahead = AHEAD * WARP_TILE * SELECT_WARPS * itemsize
    bandwidth = plan.blocks * plan.keys * itemsize / gpu.copy_rate / 1e3
    load = max(ceil(plan.keys * itemsize / ahead) * gpu.memory_us, bandwidth)
    keys = plan.keys * beside
    # The first round counts all keys; those behind it, and the count before the emission, find few.
    passes = keys / COUNTED + rounds * keys / VISITED + keys / EMITTED
    reads = 1 + (rounds + 1) * (plan.keys_in == "memory")
    meetings = rounds * (gpu.us(ROUND_CYCLES) + _exchange_us(gpu, plan.cluster))
    counts = gpu.us(100) + 2 * gpu.barrier_us(plan.cluster) + (plan.cluster > 1) * gpu.remote_us
    return 2 * gpu.l2_us + reads * load + gpu.us(passes) + meetings + counts


def _exchange_us(gpu: Gpu, cluster: int) -> float:
    """Histograms summed over a cluster: every block adds to the owners of the bins, and then reads all sums."""
    if cluster == 1:
        return gpu.barrier_us(1)
    read = max(gpu.remote_us, 4 * BINS / gpu.remote_rate / 1e3)  # four bins of a thread by one load
    return gpu.remote_us + gpu.barrier_us(cluster) + read


def _tile_us(gpu: Gpu) -> float:
    """One tile by one block: its row set by two loads, the tables, the flag, positions, then K and V side by side."""
    return 5 * gpu.l2_us + gpu.memory_us


def _gather_us(gpu: Gpu, work: Work, plan: Plan) -> float:
    """Tiles over all row sets, however budgets are shared; at the end nothing is in flight but the last of them."""
    scores = work.score_bytes * (plan.waves - 1) / plan.waves  # that are read meanwhile
    rate = gpu.copy_rate * gpu.row_share * 1e3
    tiles = ceil(work.layers * work.shape.kept / TILE_ROWS)
    slots = gpu.multiprocessors * max(1, plan.gather_blocks)
    copied = max((2 * work.output_bytes + scores) / rate + gpu.memory_us, ceil(tiles / slots) * _tile_us(gpu))
    return 2 * gpu.l2_us + copied  # a flag goes through L2


def _fused_gather_us(gpu: Gpu, work: Work, plan: Plan) -> float:
    """Every cluster moves the rows that it has selected: the longest row set is what all wait for."""
    rate = gpu.copy_rate * gpu.row_share * 1e3
    tiles = ceil(ceil(max(work.shape.per_row) / TILE_ROWS) / plan.cluster)
    bandwidth = 2 * work.output_bytes / rate
    return max(bandwidth, plan.waves * tiles * _tile_us(gpu)) + gpu.barrier_us(plan.cluster)


def main() -> int:
    import targets_gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--json", action="store_true", help="every prediction with its parts and its launch")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    if args.json:
        found = {says: asdict(predict(gpu, work)) for says, work in targets_gpu.works().items()}
        print(json.dumps({"gpu": asdict(gpu), "predictions": found}, indent=1))
    else:
        print(targets_gpu.predictions(gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
