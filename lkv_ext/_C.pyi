"""The compiled NumPy front end, csrc/python/module.cpp."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

class Request:
    """The arguments that the ops share, LKV_ARGUMENTS of csrc/host/arguments.h."""

    def __init__(
        self,
        *,
        threads: int,
        budgets: Sequence[int],
        total: int,
        padded: int = -1,
        cu_seqlens: np.ndarray | None = None,
        batch: int = 0,
        heads: int = 0,
        lengths: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        sink: int = 0,
        window: int = 0,
        max_budget: int = -1,
        reserve: int = 0,
        align: int = 1,
        back: int = 0,
        any_order: bool = False,
    ) -> None: ...

class Index:
    def __init__(self, positions: np.ndarray, lengths: np.ndarray, cu_seqlens: np.ndarray) -> None: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def cu_seqlens(self) -> np.ndarray: ...

class SelectPlan(TypedDict):
    cluster: int
    clusters: int
    warp_keys: int
    keys_in: str
    shared: int

def build_info() -> dict[str, str | None]: ...
def select(scores: np.ndarray, request: Request) -> Index: ...
def gather(
    arrays: Sequence[np.ndarray], index: Index, batch: int, heads: int, cu_seqlens: np.ndarray | None, threads: int
) -> list[np.ndarray]: ...
def evict(payload: Sequence[np.ndarray], scores: np.ndarray, request: Request) -> tuple[list[np.ndarray], Index]: ...
def evict_out(
    out: Sequence[np.ndarray], index: Index, payload: Sequence[np.ndarray], scores: np.ndarray, request: Request
) -> None: ...
def evict_(payload: Sequence[np.ndarray], scores: np.ndarray, request: Request) -> Index: ...
def evict_paged_(
    pools: Sequence[np.ndarray], scores: np.ndarray, tables: Sequence[np.ndarray], request: Request
) -> tuple[Index, np.ndarray]: ...
def plan_select(
    segments: int,
    longest: int,
    multiprocessors: int,
    shared_per_block: int,
    active: Callable[[int, int], int],
    beside: bool = False,
) -> SelectPlan: ...
