# make demo                  teach a small detector with ERA and show what it
#                            gained
# make demo-classification   the same for a small classifier
# make test                  lint, types, tests, packaging
# make docs                  the docs site, into site/
# make soak                  kills, wrong configs and files by the hundred;
#                            writes docs/reliability.md
# Each sets up what it needs first. Other goals: setup lint clean.
# PROFILE=openmmlab: with the original OpenMMLab packages; PROFILE=newest: with
# the newest torch (docs/installation.md)

PYTHON ?= python3
PROFILE ?= onedl
VENV := .venv$(patsubst %,-%,$(filter-out onedl,$(PROFILE)))
# The docs site needs neither torch nor the hosts.
DOCS_VENV := .venv-docs
# Tests that run side by side; each takes up to 2 GB.
JOBS ?= 2
# The file hides the GPU where mmcv could not be built for it.
RUN = env $$(cat $(VENV)/era_mm-setup/environment) $(VENV)/bin/python

# More threads than cores make small models slower, not faster.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export PYTHONNOUSERSITE = 1

.PHONY: demo demo-classification test soak lint docs setup clean

demo: setup
	$(RUN) -m demo.detection

demo-classification: setup
	$(RUN) -m demo.classification

test: lint
	$(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

soak: setup
	$(RUN) tests/soak/soak.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(DOCS_VENV)/made
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/made: docs/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --requirement $<
	touch $@

setup:
	@$(PYTHON) tools/setup_env.py --profile $(PROFILE) --venv $(VENV)

clean:
	rm -rf $(VENV) $(DOCS_VENV) site .cache build dist *.egg-info
