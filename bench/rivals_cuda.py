"""Rivals in CUDA C++ (cuda/rivals.cu), compiled with nvcc at first use and loaded by ctypes.

CUB's headers are the newest of those in the packages nvidia-cuda-cccl (top-k for short rows) and flashinfer-python
(brings a later CUB, with clusters for long rows) and in CUDA_HOME, or those in LKV_CCCL alone: a folder with `cub/` in
it or a checkout of CCCL. LKV_RIVALS names a library that was built elsewhere:

    python bench/rivals_cuda.py --arch 90          builds it and prints its path
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import re
from functools import cache
from pathlib import Path

import torch
from inputs import Inputs
from resources import cuda_home, package_folders, run_nvcc
from timing import Call
from torch import Tensor

import lkv_ext

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "bench" / "cuda" / "rivals.cu"
BUILT = ROOT / "build" / "bench"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VECTOR = 16  # bytes


def include_folders() -> tuple[str, list[Path]]:
    """Version of the newest CUB to be found, e.g. "3.5", and the folders to include it from."""
    roots = [cuda_home() / "include" / "cccl", cuda_home() / "include"]
    for package, inside in (("nvidia", "cu13/include/cccl"), ("flashinfer", "data/cccl")):
        roots = [*(folder / inside for folder in package_folders(package)), *roots]
    if given := os.environ.get("LKV_CCCL"):
        roots = [Path(given)]
    found = {}
    for root in roots:
        # What is installed is in one folder; a checkout has three.
        for folders in ([root], [root / "cub", root / "thrust", root / "libcudacxx" / "include"]):
            header = folders[0] / "cub" / "version.cuh"
            number = re.search(r"#define CUB_VERSION (\d+)", header.read_text()) if header.is_file() else None
            if number:
                found.setdefault(int(number[1]), folders)
    if not found:
        raise RuntimeError("no CUB headers: install nvidia-cuda-cccl or name some in LKV_CCCL")
    return dotted(max(found)), found[max(found)]


def dotted(number: int) -> str:
    """As people write it: 300500 is 3.5."""
    return f"{number // 100000}.{number // 100 % 1000}"


def build(arch: str) -> Path:
    """The library for one architecture, "90" or so; compiled unless it was already, from this source and headers.

    Raises:
        RuntimeError: nvcc or the headers are missing, or it does not compile.
    """
    version, folders = include_folders()
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]
    path = BUILT / f"rivals-cub{version}-sm{arch}-{digest}.so"
    if path.exists():
        return path
    BUILT.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    # -I and not -isystem: the toolkit's own, older copy of the headers would come first.
    options = [f"-arch=sm_{arch}", "-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"]
    run_nvcc("-shared", *options, *(f"-I{folder}" for folder in folders), "-o", part, SOURCE)
    return part.replace(path)


@cache
def _try_library() -> ctypes.CDLL | str:
    """The library or why there is none, found out once: compiling takes long."""
    try:
        arch = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "90"
        lib = ctypes.CDLL(os.environ.get("LKV_RIVALS") or str(build(arch)))
    except (OSError, RuntimeError) as error:
        return str(error)
    lib.rivals_longest.restype = ctypes.c_int64
    lib.rivals_error.restype = ctypes.c_char_p
    return lib


def library() -> ctypes.CDLL:
    """The loaded library; RuntimeError where it cannot be had."""
    result = _try_library()
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def cub_version() -> str:
    """The version of the CUB inside the library, e.g. "3.5"."""
    return dotted(library().rivals_cub_version())


def form(length: int) -> str:
    """Which of CUB's two takes rows of this length, "batched" or "per row"; RuntimeError where it has neither."""
    longest = library().rivals_longest()
    if longest == 0:
        raise RuntimeError(f"CUB {cub_version()} has no batched top-k: install nvidia-cuda-cccl >= 13.3.5")
    return "batched" if length <= longest else "per row"


def select(inputs: Inputs) -> Call:
    """CUB's top-k, batched where it takes such rows, else row by row, and one radix sort of all positions.

    Returns:
        A call that gives positions `row * L + position`, ascending, int32 `[T']`, in memory of its own.
    """
    shape, scores = inputs.shape, inputs.scores.flatten(0, 1).contiguous()
    host = torch.tensor(shape.per_segment, dtype=torch.int32)
    host = torch.stack([host, (host.cumsum(0) - host).to(torch.int32)])  # budgets, offsets
    device, result = host.to(scores.device), torch.empty(2, shape.kept, dtype=torch.int32, device=scores.device)
    tensors = (scores, *device, *host, *result)
    batched = form(shape.length) == "batched"
    selection = _fields(*tensors, *scores.shape, shape.kept, DTYPES.index(scores.dtype), batched)
    size = ctypes.c_size_t(0)

    def run(scratch: int | None) -> None:
        _check(library().rivals_select(selection, ctypes.c_void_p(scratch), ctypes.byref(size), _stream()))

    run(None)
    scratch = torch.empty(max(size.value, 1), dtype=torch.uint8, device=scores.device)

    def call() -> Tensor:
        run(scratch.data_ptr())
        return tensors[-1]

    return call


def evict(inputs: Inputs) -> Call:
    """`select`, then our gather: of one segment that holds all rows."""
    find, total = select(inputs), inputs.shape.kept
    ends = torch.tensor([0, total], dtype=torch.int32, device=inputs.k.device)
    index = lkv_ext.RaggedIndex(find(), ends[1:].view(1, 1), ends, total)
    rows = [t.view(1, 1, -1, inputs.shape.dim) for t in inputs.payload]

    def call() -> list[Tensor]:
        find()
        return lkv_ext.gather(rows, index)

    return call


def one_block_per_head(inputs: Inputs, in_place: bool = False) -> Call:
    """Our select, then a compaction by one block for each payload and head, packed or to the front of its buffer."""
    shape = inputs.shape
    if shape.row_bytes % VECTOR:
        raise ValueError(f"expected rows of whole {VECTOR}-byte vectors, got {shape.row_bytes} bytes")
    sizes = (shape.batch * shape.heads, shape.length, shape.row_bytes // VECTOR)

    def call() -> list[Tensor]:
        index = lkv_ext.select(inputs.scores, shape.budgets)
        out = list(inputs.payload) if in_place else [t.new_empty(shape.kept, shape.dim) for t in inputs.payload]
        move = _fields(*inputs.payload, *out, index.positions, index.cu_seqlens, *sizes, in_place)
        _check(library().rivals_move(move, _stream()))
        return out

    return call


def _fields(*values: Tensor | int) -> ctypes.Array[ctypes.c_int64]:
    """A struct of the C++ side: tensors by their address."""
    numbers = [value.data_ptr() if isinstance(value, Tensor) else int(value) for value in values]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(library().rivals_error(status).decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds the rivals in CUDA C++ for a machine without nvcc or headers.")
    parser.add_argument("--arch", default="90", help="compute capability without the dot")
    print(build(parser.parse_args().arch))
