# Two commands are enough: `make book` to run and read everything, `make test` to check it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UI := .venv-ui
UI_INSTALLED := $(UI)/.installed
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# What was recorded; the other experiments train the models that ship with the package.
RECORDED := $(filter-out train_% bugs,$(basename $(notdir $(sort $(wildcard experiments/*.py)))))

.DEFAULT_GOAL := help
.PHONY: help setup book html test test-fast test-ui check lab refresh fold tables tiny reward arithmetic results bench repo clean

# Builds $(1)/_build/html from the notebooks' stored outputs; pages of an earlier build never survive.
# Warnings and errors come on the other channel; what is silenced is a banner, and advice of transformers,
# which gives some for each of its models while the page of the package's functions is made.
build_pages = rm -rf $(1)/_build/html $(1)/_build/.doctrees && TRANSFORMERS_VERBOSITY=error $(BIN)/jupyter-book build $(1) -W -n --keep-going -q >/dev/null

help: ## this list
	@echo "RLHF by Experiment"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv from requirements.txt
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

book: setup ## run a copy of every notebook, build the pages from the copies
	$(BIN)/python tools/run_copies.py
	$(call build_pages,_build/run)
	@echo "Open $(CURDIR)/_build/run/_build/html/index.html"

html: setup ## build the pages from the stored outputs
	$(call build_pages,.)
	@echo "Open $(CURDIR)/_build/html/index.html"

test: setup ## lint, unit tests, notebooks against their stored outputs, pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest --nbval --nbval-current-env

test-fast: setup ## the tests that need no notebook, no pages and no other process
	$(BIN)/pytest tests -m "not slow and not pages"

check: setup ## lint, tests, notebook and page of one chapter: NOTEBOOK=dpo_derivation
	$(BIN)/python tools/check.py $(NOTEBOOK)

test-ui: ## test the labelling panel in JupyterLab and Chromium, in an environment of its own
	@test -n "$(CHROMIUM)" || { echo "test-ui needs Chromium on the PATH: apt-get install chromium (Debian, Ubuntu), or Chrome"; exit 1; }
	@$(MAKE) -s $(UI_INSTALLED)
	$(UI)/bin/python -m pytest tests_ui

$(UI_INSTALLED): requirements-ui.txt requirements.txt
	test -x $(UI)/bin/python || $(PYTHON) -m venv $(UI)
	$(UI)/bin/python -m pip install -q --disable-pip-version-check -r requirements-ui.txt
	@touch $@

lab: setup ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

refresh: setup ## run NOTEBOOK=bandit (or all) and store its outputs; RECORD=1 records time and memory too
	RECORD=$(RECORD) $(BIN)/python tools/refresh.py $(NOTEBOOK)
	@$(MAKE) -s tables

fold: setup ## close report cells in Jupyter and Colab as on the pages: NOTEBOOK=bandit (or all)
	$(BIN)/python tools/fold.py $(NOTEBOOK)

tables: setup ## write what is built from the sources: tables of chapters, equations, functions, status, bugs
	$(BIN)/python tools/build_chapters.py
	$(BIN)/python tools/build_api.py
	$(BIN)/python tools/build_status.py
	$(BIN)/python tools/build_equations.py
	$(BIN)/python tools/build_errors.py
	$(BIN)/python tools/build_which_method.py

tiny: setup ## train the tiny GPT-2 again (about ten minutes)
	@# idle threads sleep: on a machine that is busy otherwise, spinning ones cost more than they bring
	OMP_WAIT_POLICY=passive $(BIN)/python -m experiments.train_tiny_gpt2

reward: setup ## train the shipped reward model again (half a minute)
	$(BIN)/python -m experiments.train_tiny_reward

arithmetic: setup ## train the shipped model that adds again (about nine minutes)
	$(BIN)/python -m experiments.train_tiny_arithmetic

results: setup ## record the long sweeps of CHAPTER=grpo (or all, in hours) that its notebook draws
	@for chapter in $(or $(CHAPTER),$(RECORDED)); do \
		test -f experiments/$$chapter.py || { echo "no experiments/$$chapter.py; there are $(RECORDED)"; exit 1; }; \
		echo $$chapter; $(BIN)/python -m experiments.$$chapter || exit 1; done

bench: setup ## print the performance tables (FULL=1 adds install, build and test)
	@for script in $(basename $(notdir $(sort $(wildcard benchmarks/bench_*.py)))); do \
		FULL=$(FULL) $(BIN)/python -m benchmarks.$$script || exit 1; echo; done

repo: setup ## write another repository's address everywhere: REPO=owner/name
	$(BIN)/python tools/set_repo.py $(REPO)

clean: ## remove everything that was built, except .venv and .venv-ui
	rm -rf _build build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
