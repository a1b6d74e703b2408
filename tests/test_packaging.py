"""The wheel and the sdist are whole: every file is in them, and a wheel works where there is no compiler."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVICT = """
import sys
import {module} as lkv_ext, {arrays}
k = {arrays}.arange(2 * 8 * 4).reshape(1, 2, 8, 4)
out = lkv_ext.evict(k, k, {arrays}.arange(16, dtype={arrays}.float32).reshape(1, 2, 8), [3, 1])
assert out.positions.tolist() == [5, 6, 7, 7], out.positions
assert out.k[:3].tolist() == k[0, 0, 5:].tolist()
print(lkv_ext.__file__, "torch" in sys.modules)
"""

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")


def tracked(*folders: str) -> set[str]:
    names = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(names.split())


def build(kind: str, folder: Path) -> Path:
    """By setup.py, whose CMake folder has been built already; beside the sources nothing is written."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    command += ["build", "--build-base", str(folder / "build")] if kind == "bdist_wheel" else []
    result = subprocess.run([*command, kind, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (path,) = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("bdist_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True)
    return folder


def test_the_wheel_has_all_of_both_packages(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    libraries = {name for name in names if name.endswith(".so")}
    expected = {name.removeprefix("python/") for name in tracked("lkv_ext", "python")}
    assert names - libraries == expected
    assert {name.split(".")[0] for name in libraries} == {"lkv_ext/_C", "lkv_ext/_torch"}


def test_what_was_learned_takes_little_of_the_wheel(wheel: Path) -> None:
    """Checkpoints 4 MB in all, as the docs say; beside them the weights of the retriever."""
    files = {file.filename: file.file_size for file in zipfile.ZipFile(wheel).infolist()}
    checkpoints = {name: size for name, size in files.items() if name.startswith("lkv/checkpoints/")}
    assert {"lkv/checkpoints/retriever/lkv.json", "lkv/checkpoints/retriever/lkv.safetensors"} <= checkpoints.keys()
    assert sum(checkpoints.values()) <= 4e6
    weights = {name for name, size in files.items() if size > 1e5 and not name.endswith(".so")}
    assert weights - checkpoints.keys() == {"lkv/retriever/weights/model.safetensors"}


@pytest.mark.parametrize("torch", [True, False], ids=["torch", "numpy"])
def test_the_wheel_evicts_without_a_compiler(installed: Path, torch: bool, tmp_path: Path) -> None:
    code = EVICT.format(module="lkv_ext", arrays="torch")
    if not torch:
        code = EVICT.format(module="lkv_ext.numpy", arrays="numpy")
    environment = {"PYTHONPATH": str(installed), "PATH": str(tmp_path)}
    environment |= {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    file, loaded = result.stdout.split()
    assert Path(file).is_relative_to(installed) and loaded == str(torch)


def test_the_sdist_has_every_file(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or ".egg-info/" in name or name == "setup.cfg"}
    assert names - made == tracked()


def test_a_build_waits_for_another_one(tmp_path: Path) -> None:
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert other.stdout is not None
        lines = iter(other.stdout.readline, "")
        before = list(itertools.takewhile(lambda line: "waiting for another build" not in line, lines))
        assert other.poll() is None, before  # it waits
    after = other.communicate()[0]
    assert other.returncode == 0, after[-2000:]
    assert "Configuring done" in after and "Configuring done" not in "".join(before)
    assert list(tmp_path.glob("lib*/lkv_ext/_C*.so"))


NOT_BUILT = {
    "import lkv_ext; lkv_ext.evict": "_torch.so",
    "import lkv_ext.numpy": "the module _C",
    "import lkv_ext; lkv_ext.build_info()": "the module _C",
    "from lkv_ext.__main__ import main; main()": "the module _C",
}
NOT_EDITABLE = "import sys; sys.meta_path = [x for x in sys.meta_path if 'editable' not in str(x)]"


@pytest.mark.parametrize("code", NOT_BUILT)
def test_sources_that_are_not_built_say_so(code: str, tmp_path: Path) -> None:
    """As they are found where Python runs in a clone: before an installed package."""
    (tmp_path / "csrc").mkdir()
    for name in (x for x in tracked("lkv_ext") if x.endswith(".py")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LKV_LIBRARY")}
    command = [sys.executable, "-c", f"{NOT_EDITABLE}; {code}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    begin = (
        f"ImportError: lkv_ext: expected {NOT_BUILT[code]} in {tmp_path / 'lkv_ext'}, got none: these are the sources"
    )
    message = done.stderr.splitlines()[-1]
    assert message.startswith(begin) and message.endswith(f"pip install --no-build-isolation -e {tmp_path}")


def test_a_library_that_is_not_there() -> None:
    environment = os.environ | {"LKV_LIBRARY": "/nowhere/_torch.so"}
    done = subprocess.run(
        [sys.executable, "-c", "import lkv_ext; lkv_ext.evict"], env=environment, capture_output=True, text=True
    )
    assert "expected LKV_LIBRARY to be a file, got /nowhere/_torch.so" in done.stderr.splitlines()[-1]
