"""Every CUDA source compiles for each generation without a warning, and its kernels keep to the limits that
bench/resources.py sets: registers, no stack, rows moved by 16 bytes. A whole run leaves build/resources.md."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import resources  # noqa: E402
from resources import ARCHITECTURES, SOURCES, Kernel  # noqa: E402

needs_nvcc = pytest.mark.skipif(resources.find_nvcc() is None, reason="needs nvcc")
needs_disassembler = pytest.mark.skipif(resources.find_disassembler() is None, reason="needs cuobjdump and nvdisasm")


@pytest.fixture(scope="module")
def report() -> Iterator[dict[Path, list[Kernel]]]:
    """What was measured of each source."""
    measured: dict[Path, list[Kernel]] = {}
    yield measured
    if len(measured) == len(SOURCES):
        kernels = [kernel for source in SOURCES for kernel in measured[source]]
        path = ROOT / "build" / "resources.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"# Resources of the CUDA kernels\n\n{resources.summary(kernels)}\n\n"
            f"## Every instantiation\n\n{resources.markdown(kernels)}\n"
        )


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def kernels(
    request: pytest.FixtureRequest, report: dict[Path, list[Kernel]], tmp_path_factory: pytest.TempPathFactory
) -> list[Kernel]:
    """The kernels of one source: as built, which takes no warning, or compiled once for all tests."""
    binary = resources.compiled(request.param, ARCHITECTURES, tmp_path_factory.mktemp("compiled"))
    report[request.param] = resources.measure(binary)
    return report[request.param]


@needs_nvcc
@needs_disassembler
def test_compiles_without_a_warning_and_within_limits(kernels: list[Kernel]) -> None:
    assert {kernel.arch for kernel in kernels} == set(ARCHITECTURES)
    assert not resources.excesses(kernels)


@needs_nvcc
@needs_disassembler
def test_moves_rows_by_16_bytes_and_nothing_through_local_memory(kernels: list[Kernel]) -> None:
    assert all(kernel.code for kernel in kernels)
    assert not resources.defects(kernels)


USAGE = """
Fatbin elf code:
================
arch = sm_90
identifier = gather.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _Z13gather_kernelv:
  REG:200 STACK:16 SHARED:2048 LOCAL:8 CONSTANT[0]:564 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z6tinyv:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_parser_sees_registers_and_stack() -> None:
    gather, tiny = resources.parse_usage(USAGE)
    assert gather == Kernel("_Z13gather_kernelv", 90, registers=200, shared=1024, stack=24)
    assert tiny == Kernel("_Z6tinyv", 80, registers=8, shared=0, stack=0)
    assert len(resources.excesses([gather, tiny])) == 3  # registers, shared memory, stack


SASS = """
\tcode for sm_90
\t\tFunction : gather_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;       /* 0x0000000402047981 */
        /*0020*/                   ST.E.128 desc[UR4][R8.64], R4 ;           /* 0x0000000408007985 */
        /*0030*/                   LDG.E.64 R6, desc[UR4][R2.64+0x128] ;     /* 0x0001280402067981 */
        /*0040*/               @P1 LDS.128 R12, [R10] ;                      /* 0x000000000a0c7984 */
\t\tFunction : spilling_kernel
        /*0000*/                   STL [R1+0x4], R5 ;                        /* 0x0000040501007387 */
        /*0010*/             @!UP0 UBLKCP.S.G [UR8], [UR6], UR10 ;           /* 0x00000008060073ba */
        /*0020*/              @!P2 LDL.LU.64 R2, [R1] ;                      /* 0x0000000001027983 */
        /*0030*/                   NOP;                                      /* 0x0000000000007918 */
"""


def test_instruction_counter_sees_local_memory_and_vectors() -> None:
    codes = resources.parse_sass(SASS)
    gather, spilling = codes["gather_kernel", 90], codes["spilling_kernel", 90]
    assert gather == resources.Code(loads=1, stores=1, shared_loads=1, generic=1, local=0, total=5)
    assert spilling == resources.Code(loads=0, stores=0, shared_loads=0, generic=0, local=2, total=3)

    clean = Kernel("other_kernel", 90, registers=32, shared=0, stack=0, code=gather)
    assert not resources.defects([clean])
    assert len(resources.defects([clean._replace(code=spilling)])) == 1
    assert (
        len(resources.defects([clean._replace(name="gather_kernel<256>")])) == 1
    )  # one load is too few to hide latency


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_names_are_readable() -> None:
    gather = "_ZN3lkv4cuda41_GLOBAL__N__5d78ea12_9_gather_cu_6da1810213gather_kernelILi256EEEvNS_12GatherParamsE"
    select = "_ZN3lkv4cuda13select_kernelILNS_9ScoreTypeE2ELi512EEEvNS_12SelectParamsEj"
    assert resources.short_names([gather, select, "plain"]) == [
        "gather_kernel<256>",
        "select_kernel<bf16, 512>",
        "plain",
    ]
