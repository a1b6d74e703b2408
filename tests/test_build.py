"""What CMake decides, without a build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lkv_ext

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
PRINTED = "include(CudaArchs)\nlkv_default_archs(${nvcc} found)\nlkv_needed_driver(${version} driver)\n"
PRINTED += 'message("${found} ${driver}")\n'


@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
@pytest.mark.parametrize(
    "version, known, archs, driver",
    [
        ("12.4", "sm_80 sm_89 sm_90 sm_90a", "80-real;90-real;90-virtual", 525),
        ("12.8", "sm_80 sm_90 sm_100 sm_100a sm_120", "80-real;90-real;100-real;120-real;90-virtual", 525),
        ("13.0", "sm_90 sm_100 sm_103 sm_120a", "90-real;100-real;90-virtual", 580),
    ],
)
def test_architectures_that_the_compiler_knows(
    version: str, known: str, archs: str, driver: int, tmp_path: Path
) -> None:
    nvcc, script = tmp_path / "nvcc", tmp_path / "print.cmake"
    nvcc.write_text("#!/bin/sh\necho " + "; echo ".join(known.split()) + "\n")
    nvcc.chmod(0o755)
    script.write_text(PRINTED)
    given = [f"-DCMAKE_MODULE_PATH={ROOT / 'cmake'}", f"-Dnvcc={nvcc}", f"-Dversion={version}"]
    done = subprocess.run([CMAKE, *given, "-P", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == f"{archs} {driver}"


def test_the_driver_that_a_build_needs_is_said() -> None:
    info = lkv_ext.build_info()
    assert (info["cuda_driver"] is None) == (info["cuda_compiler"] is None)
