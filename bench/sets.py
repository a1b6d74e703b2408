"""The benchmarks of the CPU, once for the kernels of each instruction set that this machine runs, best first.

python bench/sets.py                      all of them, into bench/results/cpu-<instruction set>.json
python bench/sets.py --sets avx2 -k evict  one of them, with arguments for pytest

The rivals are limited to the same set, so that a row shows what a machine does that has no more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# The switches of torch, oneDNN and MKL.
SETS = {  # best first
    "avx512": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
PYTEST = ("-m", "pytest", str(HERE), "-q", "--device", "cpu", "--benchmark-only", "--benchmark-quiet")


def runs_here(environment: dict[str, str]) -> bool:
    code = "import lkv_ext; lkv_ext.build_info()"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    args, more = parser.parse_known_args()
    worst = 0
    for name in args.sets:
        environment = os.environ | SETS[name] | {"LKV_CPU_ISA": name}
        if not runs_here(environment):
            print(f"{name}: not on this machine")
            continue
        print(f"{name}:", flush=True)
        worst = max(worst, subprocess.run([sys.executable, *PYTEST, *more], env=environment).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
