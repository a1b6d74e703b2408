"""The launchers of csrc/cuda over the emulator, for NumPy, and memory of exact sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_ulonglong, c_void_p
from dataclasses import dataclass

import numpy as np

from harness.params import (
    MIRRORS,
    AppendParams,
    AttendParams,
    CompactParams,
    GatherParams,
    SelectParams,
    SoftTopkGradParams,
    SoftTopkParams,
    Source,
    SpansParams,
    Tuning,
)


@dataclass(frozen=True)
class Schedule:
    """Which thread goes next, and how much of a launch is on the device at once."""

    name: str
    seed: int = 0
    resident: int = 16
    capability: int = 90
    code: int = 90  # what the kernels were compiled for


class Emulator:
    """One shared library of emulated kernels."""

    def __init__(self, path: str) -> None:
        self._lib = lib = ctypes.CDLL(path)
        lib.emulator_allocate.restype = c_void_p
        lib.emulator_allocate.argtypes = [c_size_t]
        lib.emulator_free.argtypes = [c_void_p]
        lib.emulator_configure.argtypes = [c_char_p, c_ulonglong, c_int, c_int, c_int, c_int]
        lib.driver_upload.argtypes = [c_void_p, c_void_p, c_size_t]
        lib.driver_spans.argtypes = [POINTER(SpansParams), c_void_p, c_void_p, c_size_t, POINTER(Tuning)]
        lib.driver_select_scratch.argtypes = [c_int64, c_int64, POINTER(Tuning)]
        lib.driver_select_scratch.restype = c_size_t
        lib.driver_select.argtypes = [POINTER(SelectParams), c_int64, c_void_p, POINTER(Tuning)]
        lib.driver_gather.argtypes = [POINTER(GatherParams), c_int, POINTER(Tuning)]
        lib.driver_evict.argtypes = [POINTER(SelectParams), POINTER(GatherParams), c_int64, c_void_p,
                                     POINTER(Tuning)]  # fmt: skip
        lib.driver_compact_scratch.argtypes = [c_int64, c_int64, POINTER(Tuning)]
        lib.driver_compact_scratch.restype = c_size_t
        lib.driver_compact.argtypes = [POINTER(CompactParams), c_void_p, POINTER(Tuning)]
        lib.driver_append.argtypes = [POINTER(AppendParams), POINTER(Tuning)]
        lib.driver_attend_scratch.argtypes = [POINTER(AttendParams), POINTER(Tuning)]
        lib.driver_attend_scratch.restype = c_size_t
        lib.driver_attend.argtypes = [POINTER(AttendParams), c_void_p, POINTER(Tuning)]
        lib.driver_soft_topk.argtypes = [POINTER(SoftTopkParams), POINTER(Tuning)]
        lib.driver_soft_topk_grad.argtypes = [POINTER(SoftTopkGradParams), POINTER(Tuning)]
        lib.driver_describe.restype = c_char_p
        self._owned: list[int] = []
        sizes = (c_int64 * len(MIRRORS))()
        lib.driver_sizes(sizes)
        for mirror, size in zip(MIRRORS, sizes, strict=True):
            if ctypes.sizeof(mirror) != size:
                raise RuntimeError(f"{mirror.__name__} has {size} bytes, its mirror {ctypes.sizeof(mirror)}")

    def configure(self, schedule: Schedule, tuning: Tuning) -> None:
        self._tuning = tuning
        name = schedule.name.encode()
        where = (schedule.resident, schedule.capability, schedule.code)
        if self._lib.emulator_configure(name, schedule.seed, *where, 0) != 0:
            raise ValueError(f"not a schedule: {schedule}")

    def empty(self, size: int, dtype: np.typing.DTypeLike) -> np.ndarray:
        """Device memory of exactly `size` elements, of unpredictable content."""
        dtype = np.dtype(dtype)
        address = self._lib.emulator_allocate(size * dtype.itemsize)
        self._owned.append(address)
        raw = (ctypes.c_char * max(size * dtype.itemsize, 1)).from_address(address)
        return np.ndarray(size, dtype, buffer=raw)

    def copy(self, values: np.ndarray) -> np.ndarray:
        memory = self.empty(values.size, values.dtype)
        memory[:] = values.ravel()
        return memory

    def structs(self, items: Sequence[ctypes.Structure]) -> np.ndarray:
        """A table of structs in device memory."""
        return self.copy(np.frombuffer(b"".join(bytes(item) for item in items), np.uint8))

    def free_all(self) -> None:
        for address in self._owned:
            self._lib.emulator_free(address)
        self._owned.clear()

    def upload(self, host: np.ndarray, device: np.ndarray) -> None:
        self._check(self._lib.driver_upload(pointer(host), pointer(device), host.nbytes))

    def spans(self, p: SpansParams, host: np.ndarray, device: np.ndarray) -> None:
        """With an upload in the same launch."""
        self._check(self._lib.driver_spans(p, pointer(host), pointer(device), host.nbytes, self._tuning))

    def select(self, p: SelectParams, longest: int) -> None:
        scratch = self.empty(self._lib.driver_select_scratch(rows_of(p.source), longest, self._tuning), np.uint8)
        self._check(self._lib.driver_select(p, longest, pointer(scratch), self._tuning))

    def gather(self, p: GatherParams, behind_select: bool) -> None:
        self._check(self._lib.driver_gather(p, behind_select, self._tuning))

    def evict(self, p: SelectParams, g: GatherParams, longest: int) -> None:
        scratch = self.empty(self._lib.driver_select_scratch(rows_of(p.source), longest, self._tuning), np.uint8)
        self._check(self._lib.driver_evict(p, g, longest, pointer(scratch), self._tuning))

    def compact(self, p: CompactParams) -> None:
        scratch = self.empty(self._lib.driver_compact_scratch(p.total, p.payloads, self._tuning), np.uint8)
        self._check(self._lib.driver_compact(p, pointer(scratch), self._tuning))

    def append(self, p: AppendParams) -> None:
        self._check(self._lib.driver_append(p, self._tuning))

    def attend(self, p: AttendParams) -> None:
        scratch = self.empty(self._lib.driver_attend_scratch(p, self._tuning), np.uint8)
        self._check(self._lib.driver_attend(p, pointer(scratch), self._tuning))

    def soft_topk(self, p: SoftTopkParams) -> None:
        self._check(self._lib.driver_soft_topk(p, self._tuning))

    def soft_topk_grad(self, p: SoftTopkGradParams) -> None:
        self._check(self._lib.driver_soft_topk_grad(p, self._tuning))

    def questions(self) -> int:
        """How often launchers have queried the device."""
        return self._lib.emulator_questions()

    def synchronize(self) -> None:
        self._lib.emulator_synchronize()

    def describe(self, status: int) -> str:
        return self._lib.driver_describe(status).decode()

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self.describe(status))


def pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def rows_of(source: Source) -> int:
    return source.layers * source.batch * source.heads
