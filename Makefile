# Python 3.11 or newer and make are all that a fresh machine needs. Plain POSIX make.
#   PYTHON  what makes the virtual environment
#   VENV    where the virtual environment lies
#   TORCH   cpu, cuda, or auto: the CPU build where the package index offers one
#   JOBS    processes that share the files of tests
#   FAULTS  folders whose fault tests are run
PYTHON ?= python3
VENV ?= .venv
TORCH ?= auto
JOBS ?= 2
FAULTS ?= tests
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# What versions decide: private names, models, files, images, tokenizers, settings, engines, a run.
LOWEST = tests/contracts/test_private_internals.py tests/model tests/data/test_annotation_files.py \
    tests/data/test_build.py tests/data/test_codecs.py tests/data/test_dataset.py \
    tests/data/test_goldens.py tests/data/test_images.py tests/data/test_jinja.py \
    tests/data/test_local_ray.py tests/data/test_parquet_images.py tests/data/test_shards.py \
    tests/data/test_sources_tables.py tests/data/test_storage.py tests/data/test_tokenize.py \
    tests/data/test_tokenizer_folder.py tests/data/test_webdataset.py tests/pipelines/test_cli.py \
    tests/pipelines/test_command.py tests/train/test_feed.py tests/train/test_run.py \
    tests/train/test_saving.py tests/train/test_zero.py

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## the virtual environment with everything, at the tested versions

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt constraints-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	set -e; build=$(TORCH); if [ $$build = auto ]; then build=cuda; \
	if $(BIN)/python -m pip install -q --dry-run --no-deps "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints-cpu.txt)" > /dev/null 2>&1; then build=cpu; fi; fi; \
	$(BIN)/python -m pip install --require-hashes --no-deps -r constraints.txt -r constraints-$$build.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@touch $(STAMP)

simd: install  ## pillow-simd for this processor in Pillow's place: faster resizing
	$(BIN)/python -m pipelines.simd

lmms-eval: install  ## the environment of lmms-eval, for `lapilli evaluate --lmms_eval`
	$(BIN)/python -m pipelines.lmms_eval.environment

peers: install  ## .venv-peers: the systems that benchmarks compare with, beside ours
	$(PYTHON) -m venv $(VENV)-peers
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    > "$$($(VENV)-peers/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/lapilli.pth"
	$(BIN)/python -c 'import pathlib; print(*(pathlib.Path(p).resolve() for p in ("packages/data", "packages/model", "packages/train", ".")), sep="\n")' \
	    >> "$$($(VENV)-peers/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/lapilli.pth"
	$(VENV)-peers/bin/python -m pip install --no-deps -r pipelines/benchmarks/peers.txt

quickstart: install  ## the whole way on a CPU: data, shards, training, evaluation, report
	$(BIN)/python -m pipelines.quickstart

test: lint  ## lint, then all tests that need minutes at most and no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-faults: install  ## tests that kill processes, cut files or take a minute each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAULTS) -m faults -n $(JOBS) --dist loadfile --durations=10

test-long: install  ## tests that take minutes each or need the extra real-weights
	$(BIN)/python -m pytest -m long

test-llava: install  ## LLaVA's own trainer beside ours, in an environment of its own (.venv-readers)
	$(BIN)/python -m pytest -m llava

test-readers: install  ## exports read by transformers, PEFT, LLaVA and lmms-eval (.venv-readers)
	$(BIN)/python -m pytest -m readers --durations=10

test-cluster: install  ## a whole life on five machines that share a store; needs root
	$(BIN)/python -m pytest -m cluster

test-lowest:  ## data, models and training at the lowest versions of pyproject.toml (.venv-lowest)
	$(PYTHON) .ci/lowest.py $(VENV)-lowest
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n $(JOBS) --dist loadfile $(LOWEST)

gpu-test: install  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: install  ## ruff, pyright, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

public-names: install  ## accept the public names as they are now
	$(BIN)/python -m tests.contracts.public_names

constraints:  ## renew the pins and hashes: newest versions that pyproject.toml allows, tests not run
	$(PYTHON) .ci/constraints.py

docs: install  ## these pages as a site with search: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: install  ## wheel and source distribution in dist/, checked as an index checks them
	rm -rf dist
	$(BIN)/python -m hatchling build -t sdist -t wheel -d dist
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove caches and built wheels; the virtual environment and outputs stay
	rm -rf dist build site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find packages pipelines tests -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help install simd lmms-eval peers quickstart test test-faults test-long test-llava test-readers test-cluster test-lowest gpu-test lint format public-names constraints docs dist clean
