"""Files of a cache that are cut off, foreign or do not fit together: a ValueError that names what is wrong."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lkv_ext import RaggedCache

safetensors = pytest.importorskip("safetensors.torch")

B, H, D = 2, 3, 4


def made() -> RaggedCache:
    cache = RaggedCache.empty(B, H, D, dim_v=D + 1, reserve=8, align=4)
    cache.append(torch.randn(B, H, 5, D), torch.randn(B, H, 5, D + 1))
    cache.evict(torch.randn(len(cache.k)), [1, 2, 3], reserve=4)
    cache.append(torch.randn(B, H, 2, D), torch.randn(B, H, 2, D + 1))
    return cache


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """The file of a cache with other tensors or metadata."""
    made().save(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    safetensors.save_file(tensors, path, metadata)


def put(name: str, at: int, value: int) -> Callable[[dict, dict], None]:
    def change(tensors: dict, _: dict) -> None:
        tensors[name].view(-1)[at] = value

    return change


def replaced(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    def change(tensors: dict, _: dict) -> None:
        tensors[name] = by(tensors[name])

    return change


def counted(name: str, value: object) -> Callable[[dict, dict], None]:
    def change(_: dict, metadata: dict) -> None:
        metadata[name] = str(value)

    return change


def without(name: str) -> Callable[[dict, dict], None]:
    def change(tensors: dict, metadata: dict) -> None:
        tensors.pop(name, None)
        metadata.pop(name, None)

    return change


INCONSISTENT = {
    "offset beyond": (put("cu_seqlens", -1, 10_000), "cu_seqlens that rise"),
    "offset before": (put("cu_seqlens", 0, -4), "cu_seqlens that rise"),
    "offsets fall": (put("cu_seqlens", 2, 0), "cu_seqlens that rise"),
    "offset between pages": (put("cu_seqlens", 1, 9), "multiples of align = 4"),
    "length beyond": (put("lengths", 0, 9000), "lengths of at least 0"),
    "length negative": (put("lengths", 1, -1), "lengths of at least 0"),
    "position beyond": (put("positions", 0, 7), "positions of rows in use"),
    "position negative": (put("positions", 0, -3), "positions of rows in use"),
    "offsets int64": (replaced("cu_seqlens", torch.Tensor.long), "cu_seqlens of dtype int32"),
    "lengths float": (replaced("lengths", torch.Tensor.float), "lengths of dtype int32"),
    "positions int16": (replaced("positions", torch.Tensor.short), "positions of dtype int32"),
    "lengths flat": (replaced("lengths", lambda t: t.flatten()), "packed k and v of one layer"),
    "lengths of others": (replaced("lengths", lambda t: t[:1]), r"cu_seqlens of shape \[B \* H \+ 1\] = \[4\]"),
    "fewer offsets": (replaced("cu_seqlens", lambda t: t[:-1].clone()), "cu_seqlens of shape"),
    "k of three axes": (replaced("k", lambda t: t[None]), "packed k and v of one layer"),
    "fewer rows of k": (replaced("k", lambda t: t[:-4].clone()), "rows as in k"),
    "fewer rows of v": (replaced("v", lambda t: t[:-1].clone()), "v of T"),
    "fewer positions": (replaced("positions", lambda t: t[:-1].clone()), "positions of T"),
    "no v": (without("v"), "a saved cache"),
    "another tensor": (lambda tensors, _: tensors.update(w=torch.zeros(1)), "a saved cache"),
    "companion 1 of 1": (lambda tensors, _: tensors.update({"companions.1": torch.zeros(1)}), "a saved cache"),
    "companion of others": (lambda tensors, _: tensors.update({"companions.0": torch.zeros(1)}), "companions"),
    "no seen": (without("seen"), "seen as a count"),
    "no free": (without("_free"), "free as a count"),
    "seen of words": (counted("seen", "many"), "seen as a count"),
    "seen negative": (counted("seen", -7), "seen as a count"),
    "seen fraction": (counted("seen", "7.0"), "seen as a count"),
    "seen of many digits": (counted("seen", "9" * 5000), "seen as a count"),
    "seen beyond": (counted("seen", 2**31), "expected seen in"),
    "seen too small": (counted("seen", 3), "positions of rows in use"),
    "free too many": (counted("_free", 1000), "expected free in"),
    "tail too long": (counted("_tail", 50), "expected tail in"),
    "tail of rows that are not the last tokens": (counted("_tail", 3), r"expected tail in \[0, 2\], got 3"),
    "tail of a token that came later": (counted("seen", 8), r"expected tail in \[0, 0\], got 2"),
    "max_length too small": (counted("max_length", 1), "expected max_length in"),
    "max_length beyond": (counted("max_length", 10**9), "expected max_length in"),
    "reserve none": (counted("_reserve", 0), "expected reserve in"),
    "reserve beyond": (counted("_reserve", 2**31), "expected reserve in"),
    "align none": (counted("align", 0), "align >= 1"),
    "align odd": (counted("align", 3), "multiples of align = 3"),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_inconsistent(tmp_path: Path, name: str) -> None:
    change, message = INCONSISTENT[name]
    rewritten(tmp_path / "cache", change)
    with pytest.raises((ValueError, TypeError), match=f"^lkv_ext.RaggedCache.load: expected .*{message}|{message}"):
        RaggedCache.load(tmp_path / "cache")


def test_cut_off(tmp_path: Path) -> None:
    made().save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"^lkv_ext.RaggedCache.load: expected a whole safetensors file, got .*cut"
        ):
            RaggedCache.load(tmp_path / "cut")


def test_changed_bytes(tmp_path: Path) -> None:
    """Any byte of the header may be another: a ValueError, or a cache of which all calls go well."""
    made().save(tmp_path / "cache")
    whole = bytearray((tmp_path / "cache").read_bytes())
    header = int.from_bytes(whole[:8], "little")
    for at in range(0, 8 + header, 5):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 7)
        (tmp_path / "changed").write_bytes(changed)
        try:
            cache = RaggedCache.load(tmp_path / "changed")
        except (ValueError, TypeError) as error:
            assert str(error).startswith("lkv_ext.RaggedCache.load: expected ")
            continue
        use(cache)


def use(cache: RaggedCache) -> None:
    cache.append(cache.k.new_ones(B, H, 9, D), cache.v.new_ones(B, H, 9, D + 1))
    cache.padded(cache.positions)
    cache.crop(2)
    cache.evict(torch.zeros(len(cache.k)), 3)
    cache.select_batch([1])


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04N.", b"\xff" * 64, b"PK\x03\x04" + b"0" * 90])
def test_foreign(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"^lkv_ext.RaggedCache.load: expected a whole safetensors file"):
        RaggedCache.load(tmp_path / "other")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RaggedCache.load(tmp_path / "none")
    with pytest.raises(ValueError, match="expected a file, got the folder"):
        RaggedCache.load(tmp_path)
    with pytest.raises(TypeError, match="lkv_ext.RaggedCache.load: "):
        RaggedCache.load(None)


def test_the_file_may_change_after_loading(tmp_path: Path) -> None:
    """What was loaded is not the file: a cache may be saved where it came from, or the file cut off."""
    cache = made()
    cache.save(tmp_path / "cache")
    again = RaggedCache.load(tmp_path / "cache")
    again.save(tmp_path / "cache")
    (tmp_path / "cache").write_bytes(b"")
    assert torch.equal(again.k, cache.k) and torch.equal(again.cu_seqlens, cache.cu_seqlens)


def test_pickle(tmp_path: Path) -> None:
    """By the same checks, as copies and torch.save."""
    cache = made()
    torch.save(cache, tmp_path / "cache.pt")
    for again in (pickle.loads(pickle.dumps(cache)), torch.load(tmp_path / "cache.pt", weights_only=False)):
        assert again.mark() == cache.mark() and again.align == cache.align and torch.equal(again.k, cache.k)
        use(again)
    state = cache.__getstate__()
    for name, value, message in (
        ("cu_seqlens", cache.cu_seqlens + 8, "cu_seqlens that rise"),
        ("_free", 1000, "expected free in"),
        ("seen", 7.0, "counts that are ints"),
        ("k", None, "expected k as a dense tensor"),
    ):
        other = RaggedCache.__new__(RaggedCache)
        with pytest.raises((ValueError, TypeError), match=re.escape(message) if message[0] == "(" else message):
            other.__setstate__(state | {name: value})
        assert not hasattr(other, "k")
    for name in state:
        with pytest.raises(
            ValueError, match=re.escape(f"expected the state of a cache, got one that differs in ['{name}']")
        ):
            RaggedCache.__new__(RaggedCache).__setstate__({key: x for key, x in state.items() if key != name})


def test_what_is_written_is_what_the_format_says(tmp_path: Path) -> None:
    made().save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert header["__metadata__"].keys() == {"seen", "max_length", "_free", "_tail", "_reserve", "align"}
