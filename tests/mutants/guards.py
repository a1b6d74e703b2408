"""Which tests guard which sources: the most telling ones of a file first, as the first failure ends a mutant's run.

The first pattern that fits a source names its tests. What starts processes or compilers is left out, as it is slow.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

_CACHE = ["bookkeeping", "hf_cache", "hf_errors"]
_HF = {
    "attention": ["hf_errors", "routing", "refusals", "masks"],
    "batching": ["batching"],
    "cache": [*_CACHE, "refusals", "evict_now", "storage", "families"],
    "call": ["failed_calls", "observed", "prompts", "cascade"],
    "calls": ["failed_calls", *_CACHE, "prompts", "observed"],
    "capture": ["observed", "observed_model"],
    "cascade": ["cascade"],
    "compat": ["families", "refusals", "routing", "wrapped"],
    "copies": ["storage", *_CACHE],
    "history": ["masks", "gaps", *_CACHE],
    "layer": [*_CACHE, "masks", "evict_now", "gaps", "growth"],
    "masks": ["masks", "gaps", "prompts"],
    "observation": ["observed", "evict_now", *_CACHE],
    "planning": ["policy_settings", "cascade", "compression", "gaps", "evict_now", *_CACHE],
    "queries": ["evict_now", *_CACHE, "rope", "observed_model", "decoding_policies"],
    "routing": ["routing", "wrapped", "refusals", "families"],
    "settings": [*_CACHE, "policy_settings", "refusals"],
    "state": ["storage"],
    "storage": ["storage", *_CACHE, "growth"],
    "token_log": ["observed", "evict_now", "rope"],
    "versions": [*_CACHE, "refusals"],
}
_LEARN = {
    "config": ["schedule"],
    "dialogue": ["dialogue", "recording"],
    "distill": ["hard_masks", "passes", "distill", "padded_batches", "updates", "no_gradients"],
    "forecast": ["text_training", "no_gradients"],
    "lessons": ["lessons", "updates", "recording"],
    "metrics": ["resume"],
    "recording": ["recording", "no_gradients", "text_training"],
    "records": ["records", "recording"],
    "source": ["source", "schedule"],
    "targets": ["targets", "no_gradients", "lessons"],
    "train": ["updates", "resume", "train", "text_training"],
    "validation": ["lessons", "no_gradients"],
}
_LKV = {
    "checkpoint": ["checkpoint", "fingerprint"],
    "packaged": ["packaged"],
    "fingerprint": ["fingerprint"],
    "head_budget": ["head_budget", "hard_masks", "no_gradients"],
    "token_scorer": ["token_scorer", "hard_masks", "lkv_policy"],
}
_RETRIEVER = ["learning/test_retriever_training", "learning/test_padded_batches"]
_TASKS = ["learning/test_" + x for x in ("task_texts", "languages", "tasks", "task_files", "metrics", "eval_files")]
_BUDGETS = ["test_budgets", "test_budget_competition"]
_POLICIES = ["test_" + x for x in ("policies", "policy_cases", "policy_rules", "attention_scores", "policy_budgets")]
_POLICIES += ["test_policy_padding", "hf/test_policy_settings", "hf/test_every_policy"]
_PARITY = ["test_parity", "test_errors", "test_properties", "test_arguments"]
_TORCH = ["test_torch", "test_derivatives", "test_cache", "test_whole_cache"]
_NUMPY = ["test_numpy", "test_numpy_errors"]
_RAGGED = ["test_cache", "test_whole_cache", "test_cache_steps", "test_cache_files", "test_shared_buffers"]
_RAGGED += ["test_errors", "test_arguments", "test_tracing"]

GUARDS: dict[str, list[str]] = {
    **{f"python/lkv/hf/{name}.py": [f"hf/test_{x}" for x in tests] for name, tests in _HF.items()},
    "python/lkv/hf/*": [f"hf/test_{x}" for x in _CACHE],
    **{f"python/lkv/policies/lkv/{name}.py": [f"learning/test_{x}" for x in tests] for name, tests in _LKV.items()},
    "python/lkv/policies/lkv/policy.py": [
        *("learning/test_" + x for x in ("lkv_policy", "no_gradients")),
        "hf/test_decoding_policies",
    ],
    "python/lkv/policies/lkv/*": [
        *_POLICIES,
        *("learning/test_" + x for x in ("lkv_policy", "no_gradients", "checkpoint")),
    ],
    "python/lkv/policies/catalog.py": ["test_registry", "test_policy_budgets", "learning/test_methods"],
    "python/lkv/policies/registry.py": ["test_registry", *_POLICIES, "learning/test_methods"],
    **{
        f"python/lkv/policies/{name}.py": [*tests, *_POLICIES]
        for name, tests in {
            "across": ["hf/test_cascade"],
            "cake": ["hf/test_cascade"],
            "expected_attention": ["test_offline_policies", "hf/test_offline"],
            "fastkvzip": ["test_offline_policies"],
            "h2o": ["hf/test_decoding_policies"],
            "kvzap": ["test_offline_policies"],
            "lava": ["hf/test_cascade"],
            "lukv": ["test_offline_policies", "hf/test_offline"],
            "rkv": ["hf/test_decoding_policies"],
        }.items()
    },
    "python/lkv/policies/*": [
        *_POLICIES,
        "learning/test_scores_of_models",
        "learning/test_second_pass",
        "hf/test_generation",
        "hf/test_evict_now",
    ],
    "python/lkv/reference/policies/*": ["test_golden"],
    "python/lkv/reference/soft_topk.py": ["test_reference", "test_soft_topk"],
    "python/lkv/reference/attend.py": ["test_reference", "test_attend"],
    "python/lkv/reference/budgets.py": ["test_reference", *_BUDGETS],
    "python/lkv/reference/evict.py": ["test_paged", "test_parity", "test_properties", "test_numpy"],
    "python/lkv/reference/*": ["test_reference", "test_parity", "test_properties", "test_numpy"],
    **{f"python/lkv/learn/{name}.py": [f"learning/test_{x}" for x in tests] for name, tests in _LEARN.items()},
    "python/lkv/learn/*": ["learning/test_train", "learning/test_distill"],
    "python/lkv/evaluate/run.py": ["learning/test_evaluate", "learning/test_methods", "learning/test_report"],
    "python/lkv/evaluate/metrics.py": ["learning/test_metrics", "learning/test_metrics_peers"],
    "python/lkv/evaluate/statistics.py": ["learning/test_statistics", "learning/test_report"],
    "python/lkv/evaluate/harness.py": ["learning/test_lm_eval"],
    **{
        f"python/lkv/evaluate/{name}.py": [f"learning/test_{x}" for x in ("texts_judged", "no_gradients", "eval_texts")]
        for name in ("forced", "forks", "oracle", "texts")
    },
    "python/lkv/evaluate/lines.py": ["learning/test_plots"],
    "python/lkv/evaluate/forecast.py": ["learning/test_eval_texts"],
    "python/lkv/evaluate/results.py": ["learning/test_eval_texts", "learning/test_cli_eval"],
    "python/lkv/evaluate/text_report.py": ["learning/test_text_report", "learning/test_eval_texts"],
    **{
        f"python/lkv/evaluate/{name}.py": [f"learning/test_{x}" for x in (name, "no_gradients", "evaluate")]
        for name in ("decode", "kept", "methods", "plots", "report", "soft")
    },
    "python/lkv/evaluate/*": ["learning/test_evaluate"],
    **{
        f"python/lkv/tasks/{name}.py": [f"learning/test_{name}", "learning/test_passages"]
        for name in ("documents", "facts", "passages")
    },
    "python/lkv/tasks/corpora.py": ["learning/test_corpora"],
    "python/lkv/tasks/*": _TASKS,
    "python/lkv/retriever/__init__.py": ["learning/test_retriever_parts", "learning/test_retriever"],
    "python/lkv/retriever/*": [
        f"learning/test_{x}" for x in ("retriever_training", "retriever_parts", "padded_batches")
    ],
    "python/lkv/cli/lm_eval.py": ["learning/test_lm_eval_command"],
    "python/lkv/cli/eval.py": ["learning/test_cli_eval", "learning/test_eval_files", "learning/test_cli"],
    "python/lkv/cli/eval_texts.py": ["learning/test_eval_texts"],
    "python/lkv/cli/eval_options.py": ["learning/test_cli_eval", "learning/test_eval_texts", "learning/test_cli"],
    "python/lkv/cli/policies.py": ["test_registry", "learning/test_cli"],
    "python/lkv/cli/models.py": ["learning/test_cli_eval", "learning/test_packaged", "learning/test_cli"],
    "python/lkv/cli/train.py": ["learning/test_train_command", "learning/test_text_training", "learning/test_cli"],
    "python/lkv/cli/show.py": ["learning/test_show_command"],
    "python/lkv/cli/plan.py": ["learning/test_plan_command"],
    "python/lkv/cli/*": ["learning/test_cli", "learning/test_train"],
    "python/lkv/press/*": ["peers/test_lkv_press"],
    "python/lkv/show/*": ["learning/test_show", "learning/test_show_command"],
    "python/lkv/compression.py": ["hf/test_compression", "learning/test_no_gradients"],
    "python/lkv/offline.py": ["hf/test_offline", "learning/test_no_gradients"],
    "python/lkv/memory.py": ["hf/test_memory_footprint", "learning/test_plan_command"],
    **{
        f"python/lkv/vllm/{name}.py": [f"learning/test_engine_{name}"]
        for name in ("pages", "scores", "settings", "shares")
    },
    "python/lkv/vllm/step.py": ["learning/test_engine_pages"],
    **{
        f"python/lkv/vllm/{name}.py": [f"vllm_plugin/test_gpu_{x}" for x in ("metadata", "backends", "steps")]
        for name in ("gpu", "flash_attn", "flashinfer")
    },
    "python/lkv/vllm/refusals.py": ["vllm_plugin/test_engine_refusals", "vllm_plugin/test_gpu_refusals"],
    "python/lkv/vllm/backends.py": ["vllm_plugin/test_gpu_refusals", "vllm_plugin/test_equal_counts"],
    "python/lkv/vllm/metadata.py": [
        f"vllm_plugin/test_{name}" for name in ("gpu_metadata", "equal_counts", "shares", "gpu_steps")
    ],
    "python/lkv/vllm/*": [
        f"vllm_plugin/test_{name}" for name in ("interior", "equal_counts", "shares", "prefix_cache", "engine_refusals")
    ],
    "python/lkv/passes.py": [f"learning/test_{x}" for x in ("passes", "second_pass", "distill")],
    "python/lkv/second_pass.py": ["learning/test_second_pass", "learning/test_no_gradients"],
    "python/lkv/golden.py": ["test_golden"],
    "python/lkv/models.py": ["learning/test_models", "learning/test_cli_eval"],
    "python/lkv/text.py": ["learning/test_text", "learning/test_dialogue", "learning/test_evaluate"],
    "python/lkv/extras.py": ["learning/test_text", "learning/test_metrics"],
    "python/lkv/demo/*": [f"learning/test_{x}" for x in ("demo", "modules_run", "retriever")],
    "python/lkv/__main__.py": ["learning/test_modules_run"],
    "python/lkv/*": ["learning/test_retriever", "learning/test_cli", "learning/test_evaluate"],
    "lkv_ext/_torch/budgets.py": [*_BUDGETS, "test_policy_budgets", "test_errors", "test_arguments"],
    "lkv_ext/cache.py": _RAGGED,
    "lkv_ext/paged_cache.py": ["test_paged_cache", "test_attend_paged"],
    "lkv_ext/_torch/cache_rows.py": _RAGGED,
    "lkv_ext/_torch/cache_state.py": _RAGGED,
    "lkv_ext/_torch/append.py": [*_RAGGED, "test_fake"],
    "lkv_ext/_torch/attend_backends.py": ["test_attend_backends", "test_paged_cache"],
    "lkv_ext/_torch/attend.py": [
        "test_attend",
        "test_attend_paged",
        "test_attend_backends",
        "test_errors",
        "test_arguments",
        "test_torch",
        "test_fake",
    ],
    "lkv_ext/_torch/soft*.py": [
        "test_soft_topk_closed_forms",
        "test_soft_topk",
        "test_derivatives",
        "test_errors",
        "test_arguments",
        "test_torch",
        "test_fake",
    ],
    "lkv_ext/_torch/paged.py": ["test_paged", "test_engine_layouts", "test_kinds", "test_errors"],
    "lkv_ext/layout.py": ["test_engine_layouts"],
    "lkv_ext/_torch/vmap.py": ["test_derivatives"],
    "lkv_ext/_torch/derivatives.py": ["test_derivatives", "test_torch"],
    "lkv_ext/_torch/gather.py": ["test_derivatives", "test_torch", *_PARITY, "test_fake"],
    "lkv_ext/_torch/modes.py": ["test_derivatives", "test_calls", "test_torch", "test_cache", "test_whole_cache"],
    "lkv_ext/_torch/fake.py": ["test_fake", "test_torch", "test_tracing", "test_layouts"],
    "lkv_ext/_torch/ints.py": ["test_calls", *_PARITY, "test_tracing", "test_torch", "test_whole_cache"],
    "lkv_ext/_torch/spans.py": ["test_spans", *_RAGGED, *_PARITY],
    "lkv_ext/ragged.py": ["test_spans", *_PARITY, "test_layouts", "test_torch", "test_cache", "test_whole_cache"],
    "lkv_ext/_torch/*": [
        "test_reraise",
        *_PARITY,
        "test_overlap",
        "test_calls",
        "test_layouts",
        "test_raw_ops",
        "test_tracing",
        "test_fake",
    ]
    + _TORCH,
    "lkv_ext/__main__.py": ["learning/test_modules_run"],
    "lkv_ext/_common/unbuilt.py": ["test_packaging"],
    "lkv_ext/_common/errors.py": ["test_reraise", "test_errors", "test_arguments"],
    "lkv_ext/_common/sizes.py": ["test_sizes", "test_paged", *_NUMPY, *_PARITY],
    "lkv_ext/_common/paging.py": ["test_paged", *_NUMPY],
    "lkv_ext/_common/kinds.py": ["test_kinds", "test_errors", "test_arguments", *_NUMPY],
    "lkv_ext/_common/options.py": ["test_host_arguments", *_NUMPY, "test_reraise", *_PARITY, *_RAGGED[:2]],
    "lkv_ext/numpy.py": [*_NUMPY, "test_errors", "test_arguments"],
    "lkv_ext/_numpy.py": [*_NUMPY, "test_errors", "test_arguments", "test_overlap"],
    "lkv_ext/*": [*_NUMPY, *_PARITY, "test_calls"],
}

# Guard nothing that the others do not, or cannot run twice at a time.
LEFT_OUT = ("tests/learning/test_train.py::test_two_processes_are_one",)


def tests_of(file: str) -> tuple[str, ...]:
    """The test files that guard a source file, in the order in which they run."""
    names = next(tests for pattern, tests in GUARDS.items() if fnmatch(file, pattern))
    return tuple(f"tests/{name}.py" for name in dict.fromkeys(names))


def missing(root: Path) -> list[str]:
    return sorted({f"{x}" for names in GUARDS.values() for x in names if not (root / f"tests/{x}.py").exists()})
