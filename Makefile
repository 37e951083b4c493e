# llamanb: every command of the project. `make` alone lists them.
#
# .venv is made on first use, and again only when requirements, constraints or pyproject.toml change.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
NEEDS := requirements.txt constraints.txt pyproject.toml llamanb/setup/torch_build.py
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
WORKERS ?= 2
ARGS ?=

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

.PHONY: quickstart
quickstart: install ## install, then run notebooks/01_quickstart.ipynb into runs/quickstart
	@name=quickstart; number=1; mkdir -p runs; start=$$SECONDS; \
	while [ -e runs/$$name ]; do number=$$((number + 1)); name=quickstart-$$number; done; \
	echo "quickstart: running notebooks/01_quickstart.ipynb (about a minute on a CPU)"; \
	$(PY) -m papermill -k python3 -p name $$name --log-output --no-progress-bar \
	    notebooks/01_quickstart.ipynb runs/$$name.ipynb 2>&1 | \
	    { grep --line-buffered -vE '^((Executing|Ending) Cell|(Input|Output) Notebook|\[IPKernelApp\])' || true; } \
	    && status=0 || status=$$?; \
	executed=runs/$$name.ipynb; \
	if [ -d runs/$$name ]; then mv $$executed runs/$$name/run.ipynb; executed=runs/$$name/run.ipynb; fi; \
	echo; \
	if [ $$status -eq 0 ]; then echo "quickstart: done in $$((SECONDS - start)) s"; \
	else echo "quickstart: failed with status $$status; the executed notebook shows where" >&2; fi; \
	echo "  executed notebook  $(CURDIR)/$$executed"; \
	if [ -d runs/$$name ]; then echo "  what it made       $(CURDIR)/runs/$$name/"; fi; \
	echo "  look at them       make lab"; \
	exit $$status

.PHONY: install
install: $(INSTALLED) ## .venv with what llamanb needs, and llamanb itself, editable

.PHONY: install-dev
install-dev: $(INSTALLED_DEV) ## the same, with JupyterLab and the test tools

.PHONY: lab
lab: install-dev ## JupyterLab on the notebooks
	@$(PY) -m jupyter lab --notebook-dir . $(ARGS)

.PHONY: test
test: install-dev ## notebooks 00 to 04, and the unit tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(or $(wildcard tests/notebooks tests/unit),$(error no tests here: is this a full clone?)) \
	    -m "not gpu and not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-browser
test-browser: install-dev ## the widgets in JupyterLab, in a headless Chromium
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	    echo "error: no Chromium in PATH" >&2; \
	    echo "  why: the browser tests drive JupyterLab in it" >&2; \
	    echo "  fix: apt-get install chromium" >&2; exit 1; }
	@$(PY) -m pytest tests/browser $(ARGS)

.PHONY: faults
faults: install-dev ## 500 kills -9, and what else may befall a run; about an hour
	@LLAMANB_KILLS=500 OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults $(ARGS)

.PHONY: colab
colab: install-dev ## Colab's frozen versions, colab_setup.sh, the quickstart
	@$(PY) -m pytest tests/colab $(ARGS)

.PHONY: lint
lint: install-dev ## ruff, and notebooks without outputs
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@if compgen -G 'notebooks/*.ipynb' >/dev/null; then \
	    $(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb || { \
	        echo "fix: $(VENV)/bin/nbstripout --keep-id notebooks/*.ipynb" >&2; exit 1; }; fi

.PHONY: size
size: ## code lines of the package against the limits of the design
	@$(or $(wildcard $(PY)),python3) .ci/size.py

.PHONY: bench
bench: install ## what the README's numbers come from, as far as this machine can tell; the others say what they need
	@for name in import_time malformed plan_time watching; do \
	    echo "== benchmarks.$$name"; $(PY) -m benchmarks.$$name; done

# The first Python of these that is new enough, can make an environment and is really there (a version manager's
# stand-in may not be). `make PYTHON=...` names one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
    if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; \
    then echo $$python; break; fi; done)

$(PY):
	@if [ -z "$(PYTHON)" ]; then \
	    echo "error: no Python that can make an environment" >&2; \
	    echo "  why: looked for python3, python3.14 ... python3.11; found: $$(python3 --version 2>&1 || true)" >&2; \
	    echo "       (3.11 or newer is needed, with its modules venv and ensurepip)" >&2; \
	    echo "  fix: apt install python3 python3-venv; or name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
	    exit 1; fi
	@echo "install: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(NEEDS) | $(PY)
	@start=$$SECONDS; torch=$$($(PY) -m llamanb.setup.torch_build); \
	echo "install: $$torch and requirements.txt, at the versions of constraints.txt (a few minutes)"; \
	$(PIP) install $$torch -c constraints.txt; \
	$(PIP) install -q -r requirements.txt -c constraints.txt setuptools; \
	$(PIP) install -q --no-deps --no-build-isolation -e .; \
	echo "install: done in $$((SECONDS - start)) s"
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@$(PIP) install -q --no-build-isolation -e '.[dev]' -c constraints.txt
	@touch $@
