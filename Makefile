# Everything happens in .venv, which is made on first use; nothing is registered outside this folder.
# On Linux without an NVIDIA GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the CUDA build of torch, several GB.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MIN := $(shell sed -n 's/^min_python *= *//p' settings.ini)
DEMO := runs/demo
# These models are small: one thread is as fast as many on an idle machine, many times faster on a busy one, and gives the same bits on both.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo results bench test lowest docs preview notebooks wheel clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

setup: $(READY) ## make .venv with the tested versions (every other command does so first)

$(READY): settings.ini setup.py pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the tested versions into .venv (a minute or so; longer where torch has to be downloaded) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) found. Install Python $(MIN) or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN)".split("."))))' || \
	  { echo "Python $(MIN) or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv

demo: $(READY) ## train six objectives on real data; results in runs/demo (some three minutes)
	@mkdir -p $(DEMO)
	@$(BIN)/python -m papermill nbs/experiments/retrieval.ipynb $(DEMO)/retrieval.ipynb --kernel python3 \
	  -p data mfeat -p out $(DEMO) -y 'objectives: [PairwiseCLIP, TRIANGLE, Symile, GatedSymile, SubsetSymile, LinearGaussian]' -y 'p: [0, 0.5, 1]'
	@$(BIN)/python -m nbconvert --log-level ERROR --to html $(DEMO)/retrieval.ipynb
	@$(BIN)/python tools/demo.py $(DEMO)

# Stages of workflow/plan.yaml, and how many run at a time; make results STAGES="tuning report scale ablations robustness" runs the studies as well.
STAGES ?= tuning report
CORES ?= 2

# Without a lock, which a hard kill would leave behind: every file is written whole, so a sweep goes on as it is.
results: .venv/.sweep ## train what is not recorded in nbs/results yet (from nothing, less than 3 hours), and make its pages
	@$(BIN)/python -m snakemake -s workflow/Snakefile --cores $(CORES) --rerun-triggers mtime --rerun-incomplete --nolock --quiet rules --config stages="$(STAGES)"

.venv/.sweep: $(READY)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[sweep]' -c constraints.txt
	@touch $@

bench: $(READY) ## measure speed and memory beside the peers; results in runs/bench (some 10 minutes, on an idle machine)
	@mkdir -p runs/bench
	@$(BIN)/python -m papermill nbs/benchmarks/speed.ipynb runs/bench/speed.ipynb --kernel python3 -p out runs/bench
	@echo "Tables and figures: runs/bench/speed.ipynb; the numbers: runs/bench/speed.parquet"

test: $(READY) ## run every check, as continuous integration does
	@$(BIN)/python tools/check.py

lowest: ## test the library with the lowest versions that settings.ini allows, in an environment of its own
	@$(PYTHON) tools/lowest.py

docs: $(READY) ## build the site into _docs, with Quarto where it is installed, else with smalldocs
	@$(BIN)/python tools/docs.py build

preview: $(READY) ## serve the site on this machine and rebuild it when a notebook changes
	@$(BIN)/python tools/docs.py serve

notebooks: $(READY) ## export, execute and clean the notebooks, all or NB="nbs/api/product.ipynb ..."; make README.md
	@$(BIN)/python tools/notebooks.py $(NB)

wheel: $(READY) ## build what is released into dist, and try the wheel in a fresh environment
	@$(BIN)/python tools/release.py $(TAG)

clean: ## remove what was built (not .venv, not runs)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
