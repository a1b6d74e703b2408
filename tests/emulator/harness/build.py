"""Builds the emulated kernels with CMake, and runs them in processes of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EMULATOR = Path(__file__).resolve().parents[1]
ROOT = EMULATOR.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "csrc" / "include"  # what the CPU kernels include, too
SCHEDULES = ("in_order", "reversed", "warp_priority", "priority_changes")


def build_root() -> Path:
    return Path(os.environ.get("LKV_EMULATOR_BUILD", ROOT / "build" / "emulator"))


def program(name: str) -> str | None:
    """A build tool: the one installed for this Python first, as the system's may be too old or absent."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def missing_tool() -> str | None:
    """What this machine lacks to build the emulator; the sanitizers' run time is GCC's."""
    return next((tool for tool in ("g++", "cmake") if program(tool) is None), None)


def configure(source: Path, folder: Path, *definitions: str) -> list[str | Path]:
    """The command; a build folder keeps the generator that it began with."""
    ninja = program("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    return [program("cmake"), "-S", source, "-B", folder, "-DCMAKE_CXX_COMPILER=g++", *generator, *definitions]


def build(name: str, target: str, *, sanitize: bool = False, weak: bool = False, kernels: Path = KERNELS) -> Path:
    """Configures once, then builds what changed; returns the build folder. Safe to call from several processes."""
    folder = build_root() / name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / "CMakeCache.txt").exists():
            flags = [f"-DLKV_EMULATOR_{name}={'ON' if on else 'OFF'}" for name, on in
                     (("SANITIZE", sanitize), ("WEAK", weak))]  # fmt: skip
            flags.append("-DLKV_EMULATOR_OPTIMIZE=-O1")
            checked(configure(EMULATOR, folder, *flags, f"-DLKV_CUDA_DIR={kernels}"))
        checked([program("cmake"), "--build", folder, "--target", target, "--parallel", "2"])
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: test workers share the build folders."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def checked(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")


def environment(sanitize: bool) -> dict[str, str]:
    """Python is not built with the sanitizers, so their run time must come first, and its own leaks do not count."""
    env = {**os.environ, "PYTHONPATH": str(EMULATOR), "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1"}
    if sanitize:
        names = ("libasan.so", "libubsan.so")
        found = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in names]
        env |= {"LD_PRELOAD": " ".join(found), "PYTHONMALLOC": "malloc"}
    return env


def run_cases(
    folder: Path, suite: str, first: int, count: int, schedules: tuple[str, ...], variant: int, *, sanitize: bool
) -> subprocess.CompletedProcess[str]:
    """`count` cases of a suite of `harness.worker`, from case `first` on."""
    arguments = [folder / "libkernels.so", suite, str(first), str(count), ",".join(schedules), str(variant)]
    return subprocess.run(
        [sys.executable, "-m", "harness.worker", *arguments],
        capture_output=True,
        text=True,
        env=environment(sanitize),
        timeout=300,
    )


def run_planted(folder: Path, toy: str, version: str, schedule: str, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / "planted", toy, version, schedule, str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        timeout=60,
    )
