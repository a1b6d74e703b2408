"""What evict and select should take on a Hopper GPU, from bytes, launches, occupancy and latencies.

All times are predictions, not measurements. They are sums over one path through csrc/cuda, launched as its own planner
chooses, and ignore instruction schedules, bank conflicts beyond an average, or the memory controller. What the
constants are taken from stands beside them. Those called fitted are of one H200 (2026-11-27: selects and gathers of a
few shapes as graphs with a cold L2 cache); before, selects had been taken for three times as fast as they are. Expect
errors of a fifth.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shapes import Shape


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Gpu:
    """Facts of a card and costs of its primitives. An "estimate" was not measured for this project yet."""

    name: str
    memory_rate: float  # GB/s, data sheet
    copy_rate: float  # GB/s read and written by a contiguous copy
    row_share: float = 0.88  # of it for rows of 256 bytes in ascending order; fitted, of the H200
    # NVIDIA H100 white paper (H200: the same die): SXM5 has 132 multiprocessors, 50 MB of L2 cache.
    multiprocessors: int = 132
    l2: int = 50 << 20
    clock: float = 1.98  # GHz, boost
    # Multiprocessors of each processing cluster, which a thread block cluster cannot leave. Estimate: 132 in all, and
    # clusters of 8 were seen on 120 of them (accel-sim/gpu-app-collection, pull request 87); cards differ.
    groups: tuple[int, ...] = (18, 18, 18, 16, 16, 16, 16, 14)
    # CUDA programming guide, technical specifications of compute capability 9.0, for one multiprocessor.
    threads: int = 2048
    blocks: int = 32
    registers: int = 64 << 10
    shared: int = 228 << 10
    shared_per_block: int = 227 << 10
    shared_reserved: int = 1 << 10  # of every block, for the system
    # Latencies in us; estimates where nothing else is said.
    launch_us: float = 3.5  # of the first kernel of a graph, between the events around it; fitted
    gap_us: float = 1.0  # between kernels in a stream
    dependent_us: float = 0.2  # the same with programmatic dependent launch; fitted
    memory_us: float = 0.7  # a load from HBM under load; idle it is about 480 cycles (arXiv 2402.13499, H100 PCIe)
    l2_us: float = 0.2  # a load from L2, about 260 cycles there and more from the far half
    remote_us: float = 0.1  # a load from a peer's shared memory, about 180 cycles there
    remote_rate: float = 25  # GB/s of one multiprocessor to its peers; about 3.3 TB/s for all of them there
    cluster_barrier_us: tuple[float, float] = (0.18, 0.0075)  # at once, and for every block of the cluster

    def us(self, cycles: float) -> float:
        return cycles / self.clock / 1e3

    def barrier_us(self, cluster: int) -> float:
        return self.us(40) if cluster == 1 else self.cluster_barrier_us[0] + cluster * self.cluster_barrier_us[1]

    @property
    def row_rate(self) -> float:
        """Bytes per us of rows of 256 bytes."""
        return self.copy_rate * self.row_share * 1e3


# 4.3 TB/s: of contiguous copies of some GB, 4.2 of 270 MB; the H100 at the same share of its data sheet.
H200 = Gpu("NVIDIA H200", memory_rate=4800, copy_rate=4300)
H100 = Gpu("NVIDIA H100 80GB HBM3", memory_rate=3350, copy_rate=3000)
GPUS = {"h200": H200, "h100": H100}


@dataclass(frozen=True)
class Kernel:
    """What a block of it needs: threads, registers of each (from ptxas for sm_90), bytes of shared memory."""

    threads: int
    registers: int
    shared: int = 0

    def per_multiprocessor(self, gpu: Gpu, beside: Kernel | None = None) -> int:
        """Blocks that one multiprocessor holds, beside one block of another kernel."""
        threads, registers, shared, blocks = gpu.threads, gpu.registers, gpu.shared, gpu.blocks
        if beside is not None:
            threads, registers = threads - beside.threads, registers - beside.register_file
            shared, blocks = shared - beside.shared_with(gpu), blocks - 1
        most = (threads // self.threads, registers // self.register_file, shared // self.shared_with(gpu), blocks)
        return max(0, min(most))

    @property
    def register_file(self) -> int:
        """Registers of a block: handed out per warp, 256 at a time."""
        return ceil(self.threads / 32) * round_up(32 * self.registers, 256)

    def shared_with(self, gpu: Gpu) -> int:
        return round_up(self.shared, 128) + gpu.shared_reserved


# Constants of csrc/cuda, gather.cu and spans.cu; registers as bench/resources.py finds them for sm_90.
SELECT_THREADS, SELECT_REGISTERS = 512, 55
GATHER = Kernel(threads=256, registers=64, shared=11272)
WARP_ROWS, GATHER_WARPS, CHUNK_BYTES = 16, 8, 3456
BINS, AHEAD = 2048, 256 * SELECT_THREADS // 32  # bins of a round; keys that a block loads ahead, two tiles of a warp
# Throughput of a multiprocessor, in keys per cycle: fitted.
COUNTED = 2.5  # into a histogram
VISITED = 4  # compared and found to lie elsewhere
EMITTED = 2  # with the shuffles of a scan and the stores
ROUND_CYCLES = 2600  # clearing and searching the bins: six barriers and a scan by 512 threads; fitted
SPANS_US = 2.3  # the grid of one block that lays out spans: measured


def uploads(shape: Shape) -> int:
    """Launches that carry arguments: strides of every layer, its tokens, ragged budgets."""
    budgets = 8 * len(shape.per_segment) if shape.skewed else 0
    return ceil((shape.layers * (8 + 3 * 32) + 32 + budgets) / CHUNK_BYTES)


@dataclass(frozen=True)
class Plan:
    """How a call is launched, as csrc/cuda chooses it."""

    cluster: int  # blocks per segment
    clusters: int  # that run at once
    waves: int  # segments that one cluster works on, at most
    keys: int  # of one block
    keys_in: str  # "registers", "shared" or "memory"
    per_multiprocessor: int  # select blocks that would fit
    gather_blocks: int  # per multiprocessor, beside a select block
    launches: int

    @property
    def blocks(self) -> int:
        return self.cluster * self.clusters


def has_planner() -> bool:
    """A prebuilt op library may stand alone."""
    try:
        from lkv_ext import _C  # noqa: F401
    except ImportError:
        return False
    return True


def make_plan(gpu: Gpu, shape: Shape, op: str = "evict") -> Plan:
    """Asks the planner of the kernels; what a driver would tell it of a card's clusters is computed here."""
    from lkv_ext import _C

    def active(cluster: int, shared: int) -> int:
        """Clusters of so many blocks that run at once."""
        fit = Kernel(SELECT_THREADS, SELECT_REGISTERS, shared).per_multiprocessor(gpu)
        return sum(group * fit // cluster for group in gpu.groups)

    segments, beside = len(shape.per_segment), op != "select"
    plan = _C.plan_select(segments, shape.length, gpu.multiprocessors, gpu.shared_per_block, active, beside)
    select = Kernel(SELECT_THREADS, SELECT_REGISTERS, plan["shared"])
    return Plan(
        cluster=plan["cluster"],
        clusters=plan["clusters"],
        waves=ceil(segments / plan["clusters"]),
        keys=min(ceil(shape.length / plan["cluster"]), plan["warp_keys"] * SELECT_THREADS // 32),
        keys_in=plan["keys_in"],
        per_multiprocessor=select.per_multiprocessor(gpu),
        gather_blocks=GATHER.per_multiprocessor(gpu, beside=select),
        launches=uploads(shape) + 1 + beside,
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


def predict(gpu: Gpu, shape: Shape, op: str = "evict") -> Prediction:
    """Of one call for all layers of the shape: "evict", or "select" alone."""
    plan = make_plan(gpu, shape, op)
    wave = _select_wave_us(gpu, shape, plan)
    select = plan.waves * wave
    launch = gpu.launch_us + SPANS_US + (uploads(shape) - 1) * gpu.gap_us + gpu.dependent_us
    gather, moved = 0.0, shape.score_bytes
    total = launch + select
    if op != "select":
        moved = shape.moved_bytes
        gather = _gather_us(gpu, shape, plan)
        # The gather of a wave runs beside the selects of those behind it.
        total = launch + max(wave + gather, select + gather / plan.waves)
    parts = {"launches": launch, "select": select, "gather": gather}
    floor = moved / gpu.copy_rate / 1e3
    return Prediction(floor, select, gather, launch, total, max(parts, key=lambda part: parts[part]), plan)


def _select_wave_us(gpu: Gpu, shape: Shape, plan: Plan) -> float:
    """One segment by one cluster, while as many as run at once do the same."""
    itemsize = shape.score_dtype.itemsize
    rounds = 3 if itemsize == 4 else 2
    beside = ceil(plan.blocks / gpu.multiprocessors)  # blocks that share a multiprocessor
    bandwidth = plan.blocks * plan.keys * itemsize / gpu.copy_rate / 1e3
    load = max(ceil(plan.keys / AHEAD) * gpu.memory_us, bandwidth)
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


def _gather_us(gpu: Gpu, shape: Shape, plan: Plan) -> float:
    """Warps over all segments, however budgets are shared; at the end nothing is in flight but the last of them."""
    scores = shape.score_bytes * (plan.waves - 1) / plan.waves  # that are read meanwhile
    warps = ceil(shape.kept / WARP_ROWS)
    slots = gpu.multiprocessors * max(1, plan.gather_blocks) * GATHER_WARPS
    bandwidth = (2 * shape.output_bytes + scores) / gpu.row_rate + gpu.memory_us
    chain = 3 * gpu.l2_us + 2 * gpu.memory_us  # the flag and the segment, the position, the row
    return max(bandwidth, ceil(warps / slots) * chain)
