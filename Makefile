# What a newcomer needs: `make` lists the targets. Everything is installed into .venv, nothing outside this folder
# but the embedded model and text, which go to the user's cache folder.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help workbook workshop test test-slow test-interop lab notebooks lock clean

PYTHON ?= python3

# Text bars serve terminal and notebook alike; tqdm would ask for ipywidgets in every notebook.
export PYTHONWARNINGS := ignore:IProgress not found

# The knobs of `make workbook`. Their values are data: taken literally (a `$` in them is not make's), and handed on
# in the environment as SIMDIFF_MODEL, SIMDIFF_TEXT ..., where no shell reads them. Only those given are set.
KNOBS := MODEL TEXT K TARGET CRITERION ALPHA DTYPE
$(foreach knob,$(KNOBS),$(eval override $(knob) := $$(value $(knob))))
$(foreach knob,$(KNOBS),$(if $(value $(knob)),$(eval export SIMDIFF_$(knob) := $$(value $(knob)))))
unexport $(KNOBS)
MAKEOVERRIDES :=

# Says in one sentence what the machine lacks; argument: the free disk space needed, in GB. Any Python can read it.
define CHECK_MACHINE
import os, sys
version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed and this is %s: install a newer one, or name it, "
             "as in `make workbook PYTHON=python3.12`." % version)
try:
    import ensurepip, venv
except ImportError:
    sys.exit("Python's venv module is incomplete: on Debian and Ubuntu run `sudo apt-get install python3-venv`.")
disk = os.statvfs(".")
free = disk.f_bavail * disk.f_frsize / 1e9
if free < float(sys.argv[1]):
    sys.exit("The disk is too full: %s GB are needed in this folder and %.1f GB are free; make room and try again."
             % (sys.argv[1], free))
endef
export CHECK_MACHINE

help:  ## show this list
	@echo "make TARGET, where TARGET is one of"
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r name what; do \
	  printf '%-12s %s\n' "  $$name" "$$what"; done
	@echo
	@echo "make workbook takes, each optional (the notebooks' own defaults otherwise):"
	@echo "  MODEL=      embedded:NAME, a hub id, a Hugging Face folder or a GGUF file"
	@echo "  TEXT=       embedded:wikipedia, wikitext2, a hub data set, or a text or JSONL file"
	@echo "  K=          how many layers to remove"
	@echo "  TARGET=     in the place of K: 'params <= 100e6', 'gib <= 0.8x', 'decode_speedup >= 1.3', 'perplexity <= 1.5x'"
	@echo "  CRITERION=  how layers are chosen: cosine, masd, portfolio ... (all: notebook 06)"
	@echo "  ALPHA=      auto, or a number in [0, 1]"
	@echo "  DTYPE=      auto, float32, bfloat16 or float16"

workbook: .venv/.installed  ## install, run notebooks 01 to 05 on one model, and show the results
	@"$(PYTHON)" -c "$$CHECK_MACHINE" 2
	@[[ -n "$${SIMDIFF_MODEL:-}" && -n "$${SIMDIFF_TEXT:-}" ]] || .venv/bin/python -m simdiff_utils assets
	@.venv/bin/snakemake --quiet host progress rules reason --configfile workflow/grids/smoke.yaml
	@.venv/bin/python -m simdiff_utils results

# What the two hours of docs/teaching.md need, warmed: afterwards they work offline, and read what is there.
workshop:  ## the day before a workshop: install, fetch, and run notebooks 01 to 03 once
	@echo "This takes ten to fifteen minutes on two cores and 4 GB of disk (.venv 2.3 GB, model and text 0.6 GB)."
	@$(MAKE) --no-print-directory .venv/.installed
	@"$(PYTHON)" -c "$$CHECK_MACHINE" 2
	@.venv/bin/python -m simdiff_utils assets
	@.venv/bin/snakemake --quiet host progress rules reason --config pruning=true
	@echo "Ready: everything works offline now. On the day: make lab"

# ruff first: a slip shows within a second. After each part pytest prints the tests that took longest. The notebooks run
# one after another on all cores: side by side they would measure the same sets twice.
test: .venv/.installed  ## run all tests: lint, units, every notebook under nbval, and tests of those tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m simdiff_utils assets
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests --ignore tests/notebooks/test_notebooks.py -m "not long and not interop" -n 2 \
	  --dist loadfile --durations 10
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	export SIMDIFF_RUNS="$$scratch/runs" IPYTHONDIR="$$scratch/ipython" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false; \
	set -x; \
	TQDM_DISABLE=1 .venv/bin/python -m pytest --nbval-lax --nbval-cell-timeout=900 --durations 10 notebooks/*.ipynb; \
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/notebooks/test_notebooks.py -n 2 --durations 10

# What a package of the system is missing for is skipped, with the reason printed.
test-slow: .venv/.installed  ## faults, a short soak, Slurm and a browser, on the real engine (slurm-wlm, munge, chromium)
	@ipython=$$(mktemp -d); trap 'rm -rf "$$ipython"' EXIT; \
	IPYTHONDIR="$$ipython" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -m long -n 2 \
	  --dist worksteal --durations 10

# Each tool has an environment of its own, kept in the user's cache (SIMDIFF_INTEROP moves it).
test-interop: .venv/.installed  ## transformers 4, mergekit and llama.cpp on our exports (the first time half an hour)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/interop -m "long or interop" --durations 10

lab: .venv/.installed  ## open the notebooks in JupyterLab
	.venv/bin/jupyter lab notebooks/start.ipynb

# TQDM_DISABLE: a finished bar tells a reader nothing. Cell timings and widget state stay out of the files as well.
notebooks: .venv/.installed  ## run every notebook in place at its defaults: regenerates the committed outputs and figures/
	@ipython=$$(mktemp -d); trap 'rm -rf "$$ipython"' EXIT; \
	for notebook in notebooks/[0-9]*.ipynb; do \
	  TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 IPYTHONDIR="$$ipython" .venv/bin/jupyter nbconvert --to notebook --execute --inplace \
	    --ExecutePreprocessor.timeout=-1 --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.store_widget_state=False "$$notebook"; \
	done
	@.venv/bin/python .ci/shrink_pictures.py notebooks/[0-9]*.ipynb
	@.venv/bin/python -c 'from pathlib import Path; from simdiff_utils import provenance, results; \
	  results.publish_figures(provenance.runs_root(), Path("figures"))'

clean:  ## delete .venv and runs/ with all results (the embedded model and text stay in the user's cache)
	rm -rf .venv runs .snakemake .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find simdiff_utils workflow benchmarks tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Made with the oldest Python meant, Debian 12's, since packages drop old patch releases too.
# torch is written without its build (`+cpu`): the release is fixed, the build is what the machine's index offers.
lock:  ## rewrite requirements.lock from pyproject.toml at the newest versions (PYTHON: a Python 3.11.2)
	@"$(PYTHON)" -c "$$CHECK_MACHINE" 1
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:3] != (3, 11, 2) and \
	  "The lock is made with Python 3.11.2, the oldest meant: make lock PYTHON=/usr/bin/python3 on Debian 12.")'
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	"$(PYTHON)" -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/pip" install --quiet pip-tools; \
	"$$scratch/venv/bin/pip-compile" --quiet --extra test --strip-extras --allow-unsafe --upgrade \
	  --no-header --annotation-style line --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --output-file "$$scratch/lock" pyproject.toml; \
	if grep -Ei '^(nvidia|triton|cuda)' "$$scratch/lock"; then \
	  echo "These came with a CUDA build of torch: run make lock where pip is offered the CPU build."; exit 1; \
	fi; \
	{ echo "# The exact versions of everything, tests included, for Python 3.11.2 to 3.13. Written by one command: make lock"; \
	  echo "# pip adds, at their newest, the few packages that a machine needs beyond the one this was made on, such as CUDA"; \
	  echo "# where only that build of torch is offered."; \
	  sed -E -e 's/^(torch==[0-9.]+)\+cpu/\1/' -e '/considered to be unsafe/d' -e '/^$$/d' "$$scratch/lock" | LC_ALL=C sort -f; \
	} > "$$scratch/requirements.lock"; \
	cp "$$scratch/requirements.lock" requirements.lock

.venv/.installed: requirements.lock pyproject.toml
	@command -v "$(PYTHON)" > /dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or newer."; exit 1; }
	@"$(PYTHON)" -c "$$CHECK_MACHINE" 4
	"$(PYTHON)" -m venv --upgrade-deps .venv  # a new pip shows its progress while it installs
	.venv/bin/pip install -r requirements.lock
	.venv/bin/pip install --no-deps -e .
	touch $@
