"""What the compiler made of the CUDA kernels: registers, shared memory, stack, and the instructions that move memory.

    python bench/resources.py                          every kernel of csrc/cuda for sm_80, 90, 100 and 120
    python bench/resources.py csrc/cuda/gather.cu --arch 90
    python bench/resources.py --summary                a line per kernel, over its instantiations

Prints a Markdown table and exits with 1 where a kernel breaks its limit. Reads what `make build` has compiled, where
that is newer than the sources; else it calls nvcc. Needs no GPU, but cuobjdump and nvdisasm: of a CUDA toolkit, of the
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or of triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
SCORE_TYPES = ("f32", "f16", "bf16")  # lkv::ScoreType
WIDE = {"128", "256"}  # bits, as a suffix of an opcode


class Code(NamedTuple):
    """Instructions of one kernel, as they stand in it; how often they run is not known."""

    loads: int  # from global memory, 16 bytes or more each
    stores: int
    shared_loads: int  # 16 bytes each
    generic: int  # loads and stores whose address space the compiler did not find out
    local: int  # loads and stores of local memory: spills and arrays with computed indices
    total: int


class Kernel(NamedTuple):
    name: str
    arch: int
    registers: int
    shared: int  # static, bytes per block; what the launchers ask for comes on top
    stack: int  # bytes of local memory per thread: spills and arrays with computed indices
    code: Code | None = None


class Limit(NamedTuple):
    kernels: str  # pattern of their names; the first limit that matches holds
    registers: int  # at most
    vectors: int = 0  # 16-byte loads, and as many stores: at least


# What was measured and up to a tenth more, in the steps of 8 that registers are handed out in, but at most 64 where
# that is met: beyond it a multiprocessor holds no 1024 threads. No kernel has a stack or static shared memory.
LIMITS = (
    Limit(r"gather_kernel", 80, vectors=4),  # 64 but for sm_120
    Limit(r"(append|fill)_kernel", 64, vectors=4),
    Limit(r"compact_kernel", 128, vectors=4),  # two blocks of 256 threads share a multiprocessor
    Limit(r"split_(histogram|count)_kernel|spans_kernel", 48),
    Limit(r"soft_topk_\w*kernel", 56),
    Limit(r"upload_kernel", 40),
    Limit(r"attend_kernel<.*true>", 160),  # of mixed types
    Limit(r"attend_kernel", 128),
    Limit(r"", 64),  # any other, and any new one
)


def limit_of(kernel: Kernel) -> Limit:
    return next(limit for limit in LIMITS if re.search(limit.kernels, kernel.name))


def excesses(kernels: Iterable[Kernel]) -> list[str]:
    """What a kernel takes beyond its limits, a line each; registers are all that it may have some of."""
    found = []
    for kernel in kernels:
        most = {"registers": limit_of(kernel).registers}
        for field in ("registers", "shared", "stack"):
            if (has := getattr(kernel, field)) > most.get(field, 0):
                found.append(f"{kernel.name} for sm_{kernel.arch}: {field} {has}, at most {most.get(field, 0)}")
    return found


def defects(kernels: Iterable[Kernel]) -> list[str]:
    """What is wrong with their instructions, a line each."""
    found = []
    for kernel in kernels:
        code, limit, name = kernel.code, limit_of(kernel), f"{kernel.name} for sm_{kernel.arch}"
        if code is None:
            continue
        if code.local:
            found.append(f"{name}: {code.local} instructions on local memory")
        if min(code.loads, code.stores) < limit.vectors:
            found.append(f"{name}: {code.loads} 16-byte loads, {code.stores} stores, at least {limit.vectors} of each")
    return found


def cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH", "/usr/local/cuda")))


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(cuda_home() / "bin"))


def run_nvcc(*arguments: object) -> str:
    """What nvcc prints.

    Raises:
        RuntimeError: there is none, or it warns or fails: first its error, then all that it printed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or in CUDA_HOME")
    command = [nvcc, "-O3", "-std=c++20", "-Werror", "all-warnings", *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        errors = (line for line in result.stdout.splitlines() if "error" in line)
        raise RuntimeError(f"nvcc: {next(errors, result.returncode)}\n{result.stdout}")
    return result.stdout


def package_folders(package: str) -> list[Path]:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def find_disassembler() -> str | None:
    """cuobjdump with nvdisasm beside it."""
    folders = [*map(Path, os.get_exec_path()), cuda_home() / "bin"]
    for package, pattern in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        folders += [path for folder in package_folders(package) for path in sorted(folder.glob(pattern))]
    for folder in folders:
        tools = [shutil.which(tool, path=str(folder)) for tool in ("cuobjdump", "nvdisasm")]
        if all(tools):
            return tools[0]
    return None


def compiled(source: Path, archs: Sequence[int], folder: Path) -> Path:
    """The object of one source: of the build, where it is up to date and has all architectures, else made in `folder`.

    Raises RuntimeError where nvcc warns or fails. The build has the same flags.
    """
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    for built in ROOT.glob(f"build/cmake-{sys.implementation.cache_tag}/csrc/cuda/CMakeFiles/*/{source.name}.o"):
        if built.stat().st_mtime > newest and {f"sm_{arch}" for arch in archs} <= architectures(built):
            return built
    made = folder / f"{source.name}.o"
    targets = [word for arch in archs for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    options = ["-lineinfo", "-Xcompiler", "-Wall,-Wextra", "-I", ROOT / "csrc" / "include", *targets]
    run_nvcc("-c", source, "-o", made, *options)
    return made


def architectures(binary: Path) -> set[str]:
    return set(re.findall(r"\bsm_\d+", _cuobjdump("-lelf", binary)))


def measure(binary: Path, archs: Sequence[int] = ARCHITECTURES) -> list[Kernel]:
    """The kernels of one object."""
    with ThreadPoolExecutor() as pool:  # most of the time goes into starting the tools
        texts = list(pool.map(lambda arch: _cuobjdump("-sass", "-arch", f"sm_{arch}", binary), archs))
    codes = parse_sass("\n".join(texts))
    kernels = [kernel for kernel in parse_usage(_cuobjdump("-res-usage", binary)) if kernel.arch in archs]
    names = short_names([kernel.name for kernel in kernels])
    return [
        kernel._replace(name=name, code=codes[kernel.name, kernel.arch])
        for kernel, name in zip(kernels, names, strict=True)
    ]


def _cuobjdump(*arguments: object) -> str:
    tool = find_disassembler()
    if tool is None:
        raise RuntimeError("no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = os.pathsep.join([str(Path(tool).parent), *os.get_exec_path()])  # cuobjdump calls nvdisasm
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True).stdout


SYSTEM_SHARED = 1024  # bytes that CUDA keeps for itself from sm_90 on, of a block that has shared memory


def parse_usage(text: str) -> list[Kernel]:
    """From the words of `cuobjdump -res-usage`."""
    kernels, arch = [], 0
    pattern = r"^arch = sm_(\d+)|Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for found in re.finditer(pattern, text, re.MULTILINE):
        if found[1]:
            arch = int(found[1])
            continue
        registers, stack, shared, local = map(int, found.groups()[2:])
        system = min(shared, SYSTEM_SHARED) if arch >= 90 else 0
        kernels.append(Kernel(found[2], arch, registers, shared - system, stack + local))
    return kernels


SASS_LINE = re.compile(
    r"\s+code for sm_(?P<arch>\d+)|\s+Function : (?P<name>\S+)"
    r"|\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
)


def parse_sass(text: str) -> dict[tuple[str, int], Code]:
    """(name, architecture) -> instructions, from the words of `cuobjdump -sass`."""
    opcodes: dict[tuple[str, int], list[str]] = {}
    arch, function = 0, []
    for line in filter(None, map(SASS_LINE.match, text.splitlines())):
        if line["arch"]:
            arch = int(line["arch"])
        elif line["name"]:
            function = opcodes.setdefault((line["name"], arch), [])
        else:
            function.append(line["opcode"])
    return {key: count(function) for key, function in opcodes.items()}


def count(opcodes: Iterable[str]) -> Code:
    parts = [opcode.split(".") for opcode in opcodes]

    def number(*names: str, wide: bool = False) -> int:
        return sum(name in names and (not wide or not WIDE.isdisjoint(suffixes)) for name, *suffixes in parts)

    return Code(
        loads=number("LDG", "LDGSTS", "LD", wide=True),
        stores=number("STG", "ST", wide=True),
        shared_loads=number("LDS", wide=True),
        generic=number("LD", "ST"),
        local=number("LDL", "STL"),
        total=len(parts) - number("NOP"),
    )


def short_names(mangled: Sequence[str]) -> list[str]:
    """`select_kernel<bf16, 512>` of the mangled name, which is left as it is where no c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return list(mangled)
    result = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [shorten(name) for name in result.stdout.splitlines()]


def shorten(name: str) -> str:
    name = re.sub(r"\(lkv::ScoreType\)(\d+)", lambda value: SCORE_TYPES[int(value[1])], name)
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # other enumerations: by number
    return re.sub(r"^void |\(.*", "", name)


def markdown(kernels: Iterable[Kernel]) -> str:
    """A line per instantiation and architecture."""
    head = ["kernel", "sm", "registers", "limit", "shared", "stack"]
    head += ["16-byte loads", "stores", "from shared", "generic", "local", "instructions"]
    unknown = ("",) * len(Code._fields)
    rows = [
        [k.name, k.arch, k.registers, limit_of(k).registers, k.shared, k.stack, *(k.code or unknown)] for k in kernels
    ]
    return _table(head, rows)


def summary(kernels: Iterable[Kernel]) -> str:
    """A line per kernel: the worst of its instantiations."""
    families: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        families.setdefault(kernel.name.split("<")[0], []).append(kernel)
    archs = sorted({kernel.arch for family in families.values() for kernel in family})
    head = ["kernel", *(f"registers sm_{arch}" for arch in archs), "limit", "stack"]
    head += ["16-byte loads", "stores", "local"]
    rows = []
    for name, family in sorted(families.items()):
        registers = (max((kernel.registers for kernel in family if kernel.arch == arch), default="") for arch in archs)
        limit = max(limit_of(kernel).registers for kernel in family)
        row = [name, *registers, limit, max(k.stack for k in family)]
        codes = [kernel.code for kernel in family if kernel.code]
        row += [
            worst((getattr(code, field) for code in codes), default="")
            for field, worst in (("loads", min), ("stores", min), ("local", max))
        ]
        rows.append(row)
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, default=SOURCES)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="such as 90")
    parser.add_argument("--summary", action="store_true", help="a line per kernel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            binaries = [compiled(source, args.arch, Path(folder)) for source in args.sources]
            kernels = [kernel for binary in binaries for kernel in measure(binary, args.arch)]
        except RuntimeError as error:  # a tool is missing, or nvcc has something to say
            parser.error(str(error))
    print((summary if args.summary else markdown)(kernels))
    broken = excesses(kernels) + defects(kernels)
    print(*broken, sep="\n", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
