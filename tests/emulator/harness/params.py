"""Mirrors of the parameter structs of csrc/include/lkv/params.h and csrc/cuda/tuning.h."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_float, c_int, c_int32, c_int64, c_void_p


class Strided(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class RowInts(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("layer", c_int64),
        ("batch", c_int64),
        ("head", c_int64),
        ("fallback", c_int64),
        ("wide", c_bool),
    ]


class Source(ctypes.Structure):
    _fields_ = [
        ("layers", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("tokens", c_void_p),
        ("cu_seqlens", c_void_p),
        ("lengths", RowInts),
        ("starts", RowInts),
    ]


class Pages(ctypes.Structure):
    _fields_ = [
        ("tables", c_void_p),
        ("layer", c_int64),
        ("batch", c_int64),
        ("head", c_int64),
        ("count", c_int64),
        ("shift", c_int32),
        ("wide", c_bool),
        ("per_head", c_bool),
        ("free", c_void_p),
    ]


class SpansParams(ctypes.Structure):
    _fields_ = [
        ("source", Source),
        ("budgets", RowInts),
        ("max_budget", c_int64),
        ("page", c_int64),
        ("reserve", c_int64),
        ("align", c_int64),
        ("padded", c_int64),
        ("total", c_int64),
        ("lengths", c_void_p),
        ("cu_seqlens", c_void_p),
        ("overflow", c_void_p),
        ("ready", c_void_p),
    ]


class SelectParams(ctypes.Structure):
    _fields_ = [
        ("source", Source),
        ("scores", c_void_p),
        ("type", c_int32),
        ("sink", c_int64),
        ("window", c_int64),
        ("lengths", c_void_p),
        ("cu_seqlens", c_void_p),
        ("total", c_int64),
        ("positions", c_void_p),
        ("ready", c_void_p),
    ]


class GatherParams(ctypes.Structure):
    _fields_ = [
        ("source", Source),
        ("payloads", c_int64),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
        ("row_bytes", c_void_p),
        ("positions", c_void_p),
        ("cu_seqlens", c_void_p),
        ("total", c_int64),
        ("ready", c_void_p),
        ("warm", c_bool),
    ]


class CompactParams(ctypes.Structure):
    _fields_ = [
        ("source", Source),
        ("pages", c_void_p),
        ("to_back", c_bool),
        ("total", c_int64),
        ("payloads", c_int64),
        ("payload", c_void_p),
        ("row_bytes", c_void_p),
        ("positions", c_void_p),
        ("lengths", c_void_p),
        ("cu_seqlens", c_void_p),
        ("filled", c_void_p),
    ]


class AppendParams(ctypes.Structure):
    _fields_ = [
        ("batch", c_int64),
        ("heads", c_int64),
        ("count", c_int64),
        ("valid", RowInts),
        ("payloads", c_int64),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
        ("row_bytes", c_void_p),
        ("tokens", c_int64),
        ("cu_seqlens", c_void_p),
        ("lengths", c_void_p),
        ("positions", c_void_p),
        ("position", c_int64),
    ]


class AttendParams(ctypes.Structure):
    _fields_ = [
        ("batch", c_int64),
        ("heads", c_int64),
        ("group", c_int64),
        ("queries", c_int64),
        ("dim", c_int64),
        ("dim_v", c_int64),
        ("type", c_int32),
        ("k_type", c_int32),
        ("v_type", c_int32),
        ("q", Strided),
        ("out", Strided),
        ("k", Strided),
        ("v", Strided),
        ("tokens", c_int64),
        ("cu_seqlens", c_void_p),
        ("lengths", c_void_p),
        ("longest", c_int64),
        ("causal", c_bool),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("sinks_type", c_int32),
    ]


class RowNumbers(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 4), ("fallback", c_double), ("type", c_int32)]


class SoftRows(ctypes.Structure):
    _fields_ = [
        ("sizes", c_int64 * 4),
        ("length", c_int64),
        ("k", RowNumbers),
        ("temperature", RowNumbers),
        ("lengths", RowNumbers),
        ("type", c_int32),
        ("wide", c_bool),
        ("log", c_bool),
    ]


class SoftTopkParams(ctypes.Structure):
    _fields_ = [
        ("rows", SoftRows),
        ("scores", c_void_p),
        ("strides", c_int64 * 4),
        ("mask", c_void_p),
        ("weights", c_void_p),
    ]


class SoftTopkGradParams(ctypes.Structure):
    _fields_ = [
        ("rows", SoftRows),
        ("grad", c_void_p),
        ("mask", c_void_p),
        ("weights", c_void_p),
        ("grad_scores", c_void_p),
        ("grad_k", c_void_p),
        ("grad_temperature", c_void_p),
    ]


class Tuning(ctypes.Structure):
    _fields_ = [
        ("block", c_int),
        ("cluster", c_int),
        ("splits", c_int),
        ("resident", c_int),
        ("registers", c_int),
        ("pieces", c_int),
        ("tables", c_int),
    ]

    def __init__(self, block: int = 0, cluster: int = 0, splits: int = -1, resident: int = -1, registers: int = -1,
                 pieces: int = 0, tables: int = -1) -> None:  # fmt: skip
        super().__init__(block, cluster, splits, resident, registers, pieces, tables)


MIRRORS = (
    Strided,
    RowInts,
    Source,
    Pages,
    SpansParams,
    SelectParams,
    GatherParams,
    CompactParams,
    AppendParams,
    AttendParams,
    SoftTopkParams,
    SoftTopkGradParams,
    Tuning,
)
