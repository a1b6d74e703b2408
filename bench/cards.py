"""What is published of the cards that the targets are about, and what their primitives are taken to cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Gpu:
    """Facts of a card and costs of its primitives. An "estimate" was not measured for this project yet."""

    name: str
    memory_rate: float  # GB/s, data sheet
    copy_rate: float  # GB/s read and written by a contiguous copy
    row_share: float = 0.9  # of it for rows of 256 bytes in ascending order; estimate, between 0.8 and 0.95
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
    # Latencies in us; all estimates.
    launch_us: float = 2.5  # of the first kernel of a graph, between the events around it
    gap_us: float = 1.0  # between kernels in a stream
    dependent_us: float = 0.7  # the same with programmatic dependent launch
    memory_us: float = 0.7  # a load from HBM under load; idle it is about 480 cycles (arXiv 2402.13499, H100 PCIe)
    l2_us: float = 0.2  # a load from L2, about 260 cycles there and more from the far half
    remote_us: float = 0.1  # a load from a peer's shared memory, about 180 cycles there
    remote_rate: float = 25  # GB/s of one multiprocessor to its peers; about 3.3 TB/s for all of them there
    cluster_barrier_us: tuple[float, float] = (0.18, 0.0075)  # at once, and for every block of the cluster

    def us(self, cycles: float) -> float:
        return cycles / self.clock / 1e3

    def barrier_us(self, cluster: int) -> float:
        return self.us(40) if cluster == 1 else self.cluster_barrier_us[0] + cluster * self.cluster_barrier_us[1]


# 4.3 TB/s: of contiguous copies (specs of this project); the H100 at the same share of its data sheet.
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
        return max(
            0,
            min(threads // self.threads, registers // self.register_file, shared // self.shared_with(gpu), blocks),
        )

    @property
    def register_file(self) -> int:
        """Registers of a block: handed out per warp, 256 at a time."""
        return ceil(self.threads / 32) * round_up(32 * self.registers, 256)

    def shared_with(self, gpu: Gpu) -> int:
        return round_up(self.shared, 128) + gpu.shared_reserved
