# Each target sets up what it needs: python3 (3.11 or newer, with pip) and make are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The oldest transformers that is supported, in an environment of its own.
VENV451 := build/venv-transformers451
TYPES   := build/types
PYTEST  := -m pytest -n 2 --dist worksteal --timeout 900

# Two workers share the cores: one thread each.
test test-451 fuzz: export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-451 fuzz lint imports typecheck docs readme-tables clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(VENV)/installed ## create .venv and install everything there, pinned by constraints.txt

demo: $(VENV)/installed ## run a small ARMT sequentially and on diagonals
	$(BIN)/rmtcompile demo

test: $(VENV)/installed ## run the tests (ARGS="tests/test_x.py -k name" for some of them)
	$(BIN)/python $(PYTEST) $(ARGS)

test-451: $(VENV451)/installed ## run the tests that use transformers on transformers 4.51
	$(VENV451)/bin/python $(PYTEST) -m transformers $(ARGS)

fuzz: $(VENV)/installed ## random models beside their programs (MINUTES=10 SEED=n WORKERS=1); what fails is kept in tests/fuzzing/found
	PYTHONPATH=tests $(BIN)/python -m fuzzing --minutes $(or $(MINUTES),10) --workers $(or $(WORKERS),1) \
	    $(if $(SEED),--seed $(SEED))

lint: $(VENV)/installed ## ruff
	$(BIN)/ruff check .

# The package as it is installed: passes/ inside of rmtcompile/.
$(TYPES): FORCE
	rm -rf $(TYPES) && mkdir -p $(TYPES)/rmtcompile
	ln -s $(CURDIR)/rmtcompile/* $(CURDIR)/passes $(TYPES)/rmtcompile/
FORCE:

imports: $(VENV)/installed $(TYPES) ## import-linter: imports go one way
	cd $(TYPES) && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --no-logo $(CURDIR)/pyproject.toml

typecheck: $(VENV)/installed $(TYPES) ## mypy
	cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache -p rmtcompile

# Not with --quiet: it hides the warnings that --strict counts.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/docs ## build the documentation into build/site; a broken link is an error
	$(BIN)/mkdocs build --strict

readme-tables: $(VENV)/installed ## write the tables in docs/ from tests/handled.py
	$(BIN)/python tests/handled.py

clean: ## remove the environments and everything that was built
	rm -rf $(VENV) build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

$(VENV)/installed: constraints.txt
$(VENV451)/installed: constraints-transformers451.txt

# --without-pip and pip --python: works where python3 comes without ensurepip.
%/installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'installing into $* (once; some minutes, mostly torch)'
	$(PYTHON) -m venv --clear --without-pip $*
	$(PYTHON) -m pip --python $*/bin/python install -qq -c $(filter constraints%,$^) pip setuptools
	$*/bin/python -m pip install -qq -c $(filter constraints%,$^) --no-build-isolation -e '.[models,viz,dev]'
	touch $@
