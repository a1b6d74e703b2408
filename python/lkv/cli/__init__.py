"""The `lkv` command: `lkv train`, `eval`, `lm-eval`, `show`, `plan` and `policies`; each has `--help`."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from lkv.extras import MissingPackage


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser("lkv", description="learned KV-cache eviction")
    parser.add_argument("command", choices=("train", "eval", "lm-eval", "show", "plan", "policies"))
    command = parser.parse_args(argv[:1]).command
    try:
        if command == "train":
            from lkv.cli.train import run
        elif command == "eval":
            from lkv.cli.eval import run
        elif command == "lm-eval":
            from lkv.cli.lm_eval import run
        elif command == "show":
            from lkv.cli.show import run
        elif command == "plan":
            from lkv.cli.plan import run
        else:
            from lkv.cli.policies import run
        return run(argv[1:])
    except ModuleNotFoundError as error:
        print(f"lkv {command}: {error}; it needs: pip install 'lkv-ext[lkv]'", file=sys.stderr)
    except (ValueError, FileNotFoundError, MissingPackage) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a full disk is no fault of the program
            raise
        print(error.strerror, file=sys.stderr)
    return 2
