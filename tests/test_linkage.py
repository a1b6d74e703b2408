"""What the libraries link: one build of the op library must load with every Python, and with torch of any kind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import lkv_ext

PACKAGE = Path(lkv_ext.__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


def readelf(option: str, library: Path) -> list[str]:
    return subprocess.check_output(["readelf", option, "--wide", str(library)], text=True).splitlines()


def needed(library: Path) -> set[str]:
    return {
        line.split("[")[1].rstrip("]").split(".so")[0] for line in readelf("--dynamic", library) if "NEEDED" in line
    }


def test_op_library_needs_all_of_torch_but_no_python():
    """libtorch brings the CUDA half of torch where there is one: libtorch_cpu alone would leave the stream unknown."""
    linked = needed(PACKAGE / "_torch.so")
    assert "libtorch" in linked
    assert not {name for name in linked if name.startswith(("libpython", "libcudart", "libgomp", "libtorch_cuda"))}


def test_op_library_shares_the_cxx_runtime_of_torch():
    """Two of them, one linked statically, break error messages or end the process with the first exception."""
    linked = needed(PACKAGE / "_torch.so")
    assert linked & {"libstdc++", "libc++"} == needed(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so") & {
        "libstdc++",
        "libc++",
    }


def test_current_stream_is_a_weak_symbol():
    """So that the library loads with a torch that has no CUDA."""
    symbols = [line.split() for line in readelf("--dyn-syms", PACKAGE / "_torch.so") if "current_cuda_stream" in line]
    assert symbols and all("WEAK" in symbol and "UND" in symbol for symbol in symbols)


def test_numpy_module_links_no_torch():
    (module,) = PACKAGE.glob("_C.*.so")
    assert not {name for name in needed(module) if name.startswith(("libtorch", "libc10"))}


def test_cuda_kernels_are_registered_where_they_are_built():
    assert lkv_ext.evict  # loads the library
    built = lkv_ext.build_info()["cuda_compiler"] is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lkv_ext::evict", "CUDA") == built
