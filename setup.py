"""Calls CMake: `pip install .`, `pip install -e .` and a plain `cmake` build agree. All metadata is in pyproject.toml.

Environment: LKV_TORCH and LKV_CUDA (AUTO, ON, OFF), LKV_CUDA_ARCHS; see CMakeLists.txt.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds both libraries and installs them into the package, in place for editable installs."""

    def run(self) -> None:
        cmake, ninja = _program("cmake"), _program("ninja")
        if cmake is None or ninja is None:
            sys.exit("lkv_ext: cmake and ninja are needed to build: pip install cmake ninja")
        if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")):
            sys.exit("lkv_ext: no C++ compiler found. Install one (for example: apt install g++) or set CXX.")
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {key: os.environ[key] for key in ("LKV_TORCH", "LKV_CUDA", "LKV_CUDA_ARCHS") if key in os.environ}
        options |= {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_INSTALL_PREFIX": str(prefix),
        }
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "lock", "w") as lock:
            self._wait_for(lock)
            self._call(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions)
            self._call(cmake, "--build", str(build))
            self._call(cmake, "--install", str(build), "--component", "python")

    @staticmethod
    def _wait_for(lock: TextIO) -> None:
        """One build at a time: two commands of the Makefile may run in one clone."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lkv_ext: waiting for another build of this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)

    @staticmethod
    def _call(*command: str) -> None:
        if subprocess.run(command).returncode != 0:
            sys.exit(f"lkv_ext: `{' '.join(command[:4])} ...` failed; its messages are above")


def _program(name: str) -> str | None:
    """A build tool: the one installed for this Python first, as the system's may be too old."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


setup(
    packages=find_packages(include=["lkv_ext*"]) + find_packages("python"),
    package_dir={"lkv_ext": "lkv_ext", "lkv": "python/lkv"},
    package_data={
        "lkv_ext": ["py.typed", "_C.pyi"],
        "lkv": ["py.typed", "tasks/*.json", "demo/essay.txt", "retriever/weights/*", "checkpoints/*/*", "show/*.html"],
    },
    ext_modules=[Extension("lkv_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
