"""The runner of mutants tells killed from survived, leaves the tree alone, and finds the mutants that say something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")

from cosmic_ray.ast import ast_nodes, get_ast

from mutants import catalog, guards, results
from mutants.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]

TOY = '''
"""A toy."""


def lower(value: int | None, least: int = 1) -> int:
    if value is None:
        raise ValueError(f"expected a value of at least {least + 1}, got None")
    while value > 9:
        value -= 1
    return max(value, least)
'''
TOY_TEST = """
import pytest
from lkv.toy import lower


def test_lower():
    assert lower(5) == 5 and lower(12) == 9


def test_none():
    with pytest.raises(ValueError):
        lower(None)
"""
# What each mutant of the toy comes to, and the test that says so.
FATES = [
    ("value > 9", "value > 8", "failed", "test_lower"),
    ("value > 9", "value > 7", "failed", "test_lower"),  # same size, same second: bytecode of the first would pass
    ("max(value, least)", "value", "passed", ""),
    ("value -= 1", "pass", "timed out", "test_lower"),
    ("        raise", "        return 0\n        raise", "failed", "test_none"),
    ("def lower", "import nowhere\n\n\ndef lower", "failed", "tests/test_toy.py (import)"),
    ("return max", "__import__('os').abort()\n    return max", "failed", "signal 6"),
    ("A toy.", "A joy.", "passed", ""),
]
RUN = """
import json, sys
from pathlib import Path
from mutants import runner, tree
root, fates = Path(sys.argv[1]), json.loads(sys.argv[2])
text = (root / "python/lkv/toy.py").read_text()
runner.preload(["hypothesis", "hypothesis.core"])
copies = [tree.copy_tree(root, root / "build/mutants/tree-0")]
jobs = [
    runner.Job(("tests/test_toy.py",), (), "python/lkv/toy.py", text.replace(a, b), limit=3, subject=i)
    for i, (a, b, *_) in enumerate(fates)
]
for outcome in runner.run_all([*jobs, runner.Job(("tests/test_toy.py",), subject=-1)], copies):
    print(json.dumps([outcome.job.subject, outcome.result, outcome.by, outcome.output]))
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in {"python/lkv/__init__.py": "", "python/lkv/toy.py": TOY, "tests/test_toy.py": TOY_TEST}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".gitignore").write_text("build/\n")
    subprocess.run(("git", "init", "-q"), cwd=tmp_path, check=True)
    return tmp_path


def run(*command: str, path: Path = ROOT / "tests") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_fates_of_a_toy(toy: Path) -> None:
    done = run("-c", RUN, str(toy), json.dumps(FATES))
    assert done.returncode == 0, done.stderr
    outcomes = {number: rest for number, *rest in map(json.loads, done.stdout.splitlines())}
    for number, (before, after, result, by) in enumerate(FATES):
        assert TOY.count(before) == 1
        assert outcomes[number][0] == result and by in outcomes[number][1], (after, outcomes[number])
    assert outcomes[-1][0] == "passed", "a mutant stayed in the copy"
    assert (toy / "python/lkv/toy.py").read_text() == TOY


def test_tests_that_cannot_run_kill_nothing(toy: Path) -> None:
    with (toy / "tests/test_toy.py").open("a") as file:
        file.write('\n\npytest.importorskip("nowhere")\n')
    done = run("-c", RUN, str(toy), json.dumps(FATES[:1]))
    assert (
        done.returncode != 0 and "expected tests in ('tests/test_toy.py',), got none that can run here" in done.stderr
    )


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_do_as_their_examples_say(operator: type) -> None:
    for example in operator.examples():
        source = example.pre_mutation_code
        places = [(n, i) for n in ast_nodes(get_ast(source)) for i, _ in enumerate(operator().mutation_positions(n))]
        node, index = places[example.occurrence]
        begin, end = node.get_start_pos_of_prefix()[1], node.end_pos
        code = operator().mutate(node, index).get_code()
        lines = source.splitlines(keepends=True)
        rest = lines[end[0] - 1][end[1] :] + "".join(lines[end[0] :]) if end[0] <= len(lines) else ""
        assert source[:begin] + code + rest == example.post_mutation_code


def test_mutants_of_a_toy() -> None:
    found = [x for x in catalog.mutants(TOY, "toy.py") if catalog.says_something(x, TOY)]
    changes = {(x.before, x.after) for x in found}
    loop, end = "while value > 9:", "return max(value, least)"
    assert {(loop, "while value >= 9:"), (loop, "while value > 10:"), (loop, "while not value > 9:")} <= changes
    assert {("value -= 1", "pass"), ("value -= 1", "value -= 2"), (end, "return (value)")} <= changes
    assert ("def lower(value: int | None, least: int = 1) -> int:",) * 2 not in changes
    assert not [after for _, after in changes if "int & None" in after or "least - 1" in after or "least + 2" in after]
    for mutant in found:
        assert mutant.apply(TOY) != TOY and mutant.where == "lower"
        assert mutant.after in mutant.apply(TOY) or "\n" in mutant.after


def test_keys_stay_while_other_lines_change() -> None:
    moved = TOY.replace("while value > 9", "while value > 10").replace("def lower", "LIMIT = 9\n\n\ndef lower")
    before, after = ({x.key for x in catalog.mutants(text, "toy.py") if "9" not in x.before} for text in (TOY, moved))
    assert len(before) > 8 and before - after == set()


def test_a_sample_is_spread_and_stays() -> None:
    files = ["python/lkv/tasks/retrieval.py", "lkv_ext/_common/sizes.py", "lkv_ext/cache.py"]
    first = catalog.sample(ROOT, files, 40, 0)
    assert first == catalog.sample(ROOT, files[::-1], 40, 0) != catalog.sample(ROOT, files, 40, 1)
    assert {catalog.area_of(x.file) for x in first} == {"ops", "tasks"} and len(first) in (40, 41)
    assert len({x.kind for x in first}) >= 10 and len({x.key for x in first}) == len(first)
    assert {x.key for x in first} > {x.key for x in catalog.sample(ROOT, files, 12, 0)}


def test_every_source_has_guards() -> None:
    assert guards.missing(ROOT) == []
    assert all(guards.tests_of(file) for file in catalog.sources(ROOT))
    assert [x for x in catalog.SILENT_FILES if not (ROOT / x).exists()] == []


def test_what_is_filed_as_equivalent_is_a_mutant() -> None:
    """An entry whose line has changed says nothing any more: it goes, or is judged anew."""
    reasons = results.equivalents()
    there = {
        results.identity(x)
        for file in {x[0] for x in reasons}
        if (ROOT / file).exists()
        for x in catalog.mutants((ROOT / file).read_text(), file)
    }
    assert [x for x in reasons if x not in there] == []


def test_an_entry_is_read_as_it_is_written(tmp_path: Path) -> None:
    mutants = [x for x in catalog.mutants(TOY, "toy.py") if x.kind in ("statement", "guard", "number")]
    (tmp_path / "toy.toml").write_text("\n".join(map(results.as_entry, mutants)).replace('reason = ""', 'reason = "x"'))
    assert results.equivalents(tmp_path) == {results.identity(x): "x" for x in mutants}
    (tmp_path / "toy.toml").write_text(results.as_entry(mutants[0]))
    with pytest.raises(ValueError, match="has no reason"):
        results.equivalents(tmp_path)


def test_results_are_kept_and_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    made = [
        results.Result(str(i), "ops", x, "", f"m{i}") for i, x in enumerate(["killed"] * 17 + ["timed out", "survived"])
    ]
    for each in [results.Result("18", "ops", "killed", "", "m18"), *made]:
        results.Store(path).add(each)
    store = results.Store(path)
    assert store.known(made[18], lambda tests: "", []) == made[18]
    assert store.known(made[18], lambda tests: "of other tests", []) is None
    assert store.state("18") == "survived" and store.state("19") == "not run"
    assert results.share(made) == 18 / 19 < results.ENOUGH
    others = [results.Result("e", "hf", "equivalent", "", ""), results.Result("n", "hf", "not run", "", "")]
    assert results.share([*made, *others]) == 18 / 19 and results.share(others) == 1
    table = results.summary([*made, *others])
    assert "survived: m18" in table and "94.7%" in table.splitlines()[-1]


def test_results_are_filed_by_area(tmp_path: Path) -> None:
    """Those of areas that were judged again go; what was not tried is not filed."""
    filed, local = tmp_path / "verdicts.jsonl", tmp_path / "results.jsonl"
    old = [results.Result(x, x, "killed", "test", f"mutant of {x}", "old") for x in ("ops", "hf")]
    results.keep(old, ["ops", "hf"], filed)
    new = [replace(old[0], state="survived", digest="new"), results.Result("b", "ops", "not run", "", "other", "new")]
    results.keep(new, ["ops"], filed)
    assert results.read(filed) == [old[1], new[0]]
    results.Store(local).add(old[0])
    for digest, found in (("new", new[0]), ("old", old[0])):
        assert results.Store(local, filed).known(new[0], lambda tests, digest=digest: digest, []) == found
    assert results.Store(local, filed).state("ops") == "killed"


def test_a_killed_mutant_is_tried_again_where_its_source_or_the_test_that_noticed_has_changed(tmp_path: Path) -> None:
    """And a survivor where any test has."""
    tests = ("tests/test_a.py", "tests/test_b.py")
    killed = results.Result("key", "ops", "killed", "tests/test_b.py::test_x[1]", "")
    assert results.decisive(killed, tests) == ["tests/test_b.py"]
    assert results.decisive(replace(killed, by="tests/test_b.py (import)"), tests) == tests
    assert results.decisive(replace(killed, state="survived", by=""), tests) == tests
    for name in ("source.py", "tests/test_a.py", "tests/test_b.py", "tests/folder/part.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert results.digest(tmp_path, "source.py", tests[:1]) != results.digest(tmp_path, "source.py", tests[1:])
    before = results.digest(tmp_path, "source.py", ["tests/folder"])
    (tmp_path / "tests/folder/part.py").write_text("other")
    assert results.digest(tmp_path, "source.py", ["tests/folder"]) != before
