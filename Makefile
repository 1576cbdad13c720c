# Needs only make and a Python of 3.11 or later. Everything is installed into .venv, once: the stamps below
# are renewed only when pyproject.toml or constraints.txt changes.
#
#   make demo RANKS=4 DATA=path ARGS="..."
#   make test PYTHON=/path/to/python3.12     the Python that creates .venv
#   make gpu-check PY=python3                no .venv: an interpreter that already has torch and pytest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY ?=
RANKS ?= 2
DATA ?=
MODEL ?= deepfm
WORKERS ?= 2
LONG ?=
ARGS ?=

# One place spells the torch version; see constraints.txt for why it is installed alone and first.
TORCH := $(shell grep '^torch==' constraints.txt)
# Installed without their dependencies: they ask for releases that don't run here, and need none of them (pyproject.toml).
ALONE := $(shell grep -E '^(recbole|rectools)==' constraints.txt)
# For tests of its jagged inputs; without dependencies too, some of which (torchmetrics, iopath) only its training needs.
TORCHREC := torchrec fbgemm-gpu-cpu cloudpickle importlib_metadata orjson pyre-extensions pyvers tensordict typing-inspect zipp

ifeq ($(strip $(PY)),)
RUN := .venv/bin/python
TORCHRUN := .venv/bin/torchrun
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
else
RUN := $(PY)
TORCHRUN := $(PY) -m torch.distributed.run
INSTALLED :=
INSTALLED_DEV :=
export PYTHONPATH := $(CURDIR)
endif

.DEFAULT_GOAL := help
.PHONY: help demo stream test test-all check exits soak mutants rules zoo gpu-check report paper-table bench bench-quick bench-links bench-memory clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done

demo: $(INSTALLED)  ## train a CTR model on RANKS local ranks (RANKS=2, DATA=, ARGS=)
	OMP_NUM_THREADS=1 $(TORCHRUN) --standalone --nproc-per-node $(RANKS) \
		examples/train_ctr.py $(if $(DATA),--data $(DATA)) $(ARGS)

stream: $(INSTALLED)  ## train on an endless click stream until Ctrl-C, and go on the next time (RANKS=2, ARGS=)
	OMP_NUM_THREADS=1 $(TORCHRUN) --standalone --nproc-per-node $(RANKS) examples/streaming.py $(ARGS)

# Two at a time, whole files to one worker, in the order of tests/conftest.py: tests of a file share captures and ranks.
# A test has 2 to 4 ranks itself.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(INSTALLED_DEV)  ## run nine tenths of the tests that are not slow (LONG=1: all of them, as CI does; WORKERS=2)
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL) $(if $(LONG),,-m "not slow and not long") $(ARGS)

test-all: $(INSTALLED_DEV)  ## run every test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "" --trace-anew $(PARALLEL) $(ARGS)

# Doctests run on descompiler alone: its links reach passes/ and cost_models/ under their import names, once.
# pytest's exit status 5 says that there was no doctest, which is not a failure.
check: $(INSTALLED_DEV)  ## lint, format, types, doctests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q --doctest-modules descompiler || [ $$? -eq 5 ]

report: $(INSTALLED)  ## write artefacts/report.html, the page of one model (MODEL=deepfm, ARGS=)
	@mkdir -p artefacts
	$(RUN) -m descompiler report $(MODEL) --html artefacts/report.html --batch 4096 $(ARGS)

paper-table: $(INSTALLED)  ## write docs/paper.md: what six models send, against the mesh and a parameter server
	$(RUN) -m descompiler cost --paper --ranks 8 --batch 1024 --markdown > docs/paper.md.new
	@mv docs/paper.md.new docs/paper.md && cat docs/paper.md

mutants: $(INSTALLED_DEV)  ## break the product on purpose, in a copy: which mutations do the tests see? (ARGS="part of a name")
	OMP_NUM_THREADS=1 $(RUN) -m tests.mutants.run $(ARGS)

rules: $(INSTALLED_DEV)  ## write docs/rules.md: what rules owe, and the placements that none offers
	$(RUN) -m tests.harness.missing

zoo: $(INSTALLED_DEV)  ## verify every model of public libraries on 2 ranks, write docs/zoo.md (ARGS="part of a name")
	OMP_NUM_THREADS=1 $(RUN) -m tests.harness.sweep $(ARGS)

bench: $(INSTALLED_DEV)  ## steps side by side: plans, forms, DDP, TorchRec, by hand; writes docs/benchmarks.md (root; ARGS="--only fm")
	PYTHONPATH=$(CURDIR) $(RUN) benchmarks/steps.py $(ARGS)
	PYTHONPATH=$(CURDIR) $(RUN) benchmarks/page.py

bench-quick: $(INSTALLED_DEV)  ## three minutes of it: LR, FM and DeepFM, 2 ranks, two links; into artefacts/bench
	PYTHONPATH=$(CURDIR) $(RUN) benchmarks/steps.py --only lr fm deepfm --rows 1000000 --batch 1024 --ranks 2 \
		--links unshaped "1 Gbit/s" --gradients sparse --rounds 5 --calibrate-s 0.2 --out artefacts/bench $(ARGS)

bench-links: $(INSTALLED)  ## predicted against measured bytes and seconds on shaped links (root; ARGS="--verbose")
	PYTHONPATH=$(CURDIR) $(RUN) benchmarks/links.py $(ARGS)

exits: $(INSTALLED)  ## exit statuses of many runs of scripts and commands under torchrun (ARGS="--runs 50 --busy")
	PYTHONPATH=$(CURDIR) $(RUN) benchmarks/exits.py $(ARGS)

soak: $(INSTALLED)  ## 20,000 training steps in every form and situation: memory, objects, descriptors (ARGS="--only unique_rows")
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(RUN) benchmarks/soak.py $(ARGS)

bench-memory: $(INSTALLED)  ## peak memory of compiling 4 GiB of tables on 2 ranks, saving and loading (ARGS="--gib 1")
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(RUN) benchmarks/memory.py $(ARGS)

gpu-check: $(INSTALLED_DEV)  ## run the tests that need a GPU (PY=python3: without .venv)
	$(RUN) -m pytest tests/test_gpu.py -rs $(ARGS)

clean:  ## remove builds and caches, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; say PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, not " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	.venv/bin/python -m pip install --quiet -c constraints.txt setuptools
	.venv/bin/python -m pip install --quiet --no-build-isolation -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev,zoo]'
	.venv/bin/python -m pip install --quiet --no-deps $(ALONE)
	.venv/bin/python -m pip install --quiet --no-deps -c constraints.txt $(TORCHREC)
	@touch $@
