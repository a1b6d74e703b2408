"""Mutants: the sources with one careless mistake each, and whether the tests notice.

`make mutants` tries a sample of all areas. `python -m mutants --area hf --count 40` (with PYTHONPATH=tests) tries one
area, `--files 'lkv_ext/_torch/*.py'` some files, `--survivors` only what survived last time, `--list` prints them.

A mutant is killed when a test of its file fails (guards.py says which tests those are) or when one takes several times
as long as without it. A survivor needs the test that was missing; where no test can tell, because the
mutant behaves as the original, the mutant goes into a file of equivalent/ with the reason. Less than 95 % of the others
killed is a failure.

C++ and CUDA have lists of changes instead of a sample (native.py): `--area csrc` tries them, and each must be killed.

Results are in build/mutants/results.jsonl; a run goes on where the last one ended, and tries again only mutants whose
source or tests have changed. `--keep` files them in verdicts.jsonl, from where another machine goes on; `--anew` tries
what is filed as well. Mutants are written into copies of the tree in build/mutants, never into the tree.
"""
