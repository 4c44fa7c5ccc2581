# The commands a person needs. All of them set up .venv first; a second run finds it ready and adds under two seconds.
#
#   make studio      open the studio in the browser          (ARGS="--port 8000" passes flags on)
#   make test        run the tests                           (ARGS="tests/unit -k layout" chooses some)
#   make check       formatting, lint and types alone
#   make mini        train Mini, the embedded model, anew; cut off, it goes on (ARGS="--help" lists its stages)
#   make mini-more   on an accelerator: nine more minutes from the newest weights, written back with card and sheet
#   make benchmarks  measure, and write benchmarks/results
#   make readme      bring the file list and the benchmark table of README.md up to date
#   make wheel       build dist/*.whl
#   make clean       remove .venv and everything built
#
# PYTHON=python3.12 chooses the interpreter. TORCH chooses another PyTorch, for example a CUDA build:
#   make studio TORCH="torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
TORCH ?= $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
ARGS ?=

# What is installed follows from these contents alone, so a stamp named after them says whether it is up to date.
KEY := $(shell { cat pyproject.toml constraints.txt; echo '$(TORCH) $(CURDIR)'; } | cksum | tr ' ' '-')
STUDIO := $(VENV)/.studio-$(KEY)
TOOLS := $(VENV)/.tools-$(KEY)

.PHONY: help studio test check mini mini-more benchmarks readme wheel clean

help:
	@sed -n 's/^#   make/make/p' Makefile

studio: $(STUDIO)
	@exec $(BIN)/intarsia ui $(ARGS)

test: $(TOOLS) $(VENV)/.browser
	@exec $(BIN)/python -P -m pytest $(ARGS)

check: $(TOOLS)
	@mkdir -p .typecheck && ln -sfn .. .typecheck/intarsia
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

mini: $(TOOLS)
	@$(BIN)/intarsia corpus build --out runs/corpus
	@exec $(BIN)/python -m intarsia.training.base --data runs/corpus --work runs/mini --out assets/mini $(ARGS)

mini-more: $(TOOLS)
	@exec $(BIN)/python -m intarsia.training.long_run $(ARGS)

benchmarks: $(TOOLS)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.train_blora
	$(BIN)/python -m benchmarks.readme

readme: $(TOOLS)
	$(BIN)/python -m benchmarks.readme

# setuptools would put stale files of an earlier build/ into the wheel
wheel: $(TOOLS)
	@rm -rf build dist
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build

clean:
	rm -rf $(VENV) build dist .typecheck .pytest_cache .ruff_cache *.egg-info

# PyTorch first and by itself: asked for together with the rest, pip may choose a newer one, gigabytes larger.
$(VENV)/.torch-$(KEY):
	@test -n "$(PYTHON)" || { echo "Intarsia needs Python 3.11 or newer; none was found. Name one: make studio PYTHON=/path/to/python3"; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON): some minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --quiet $(TORCH)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@rm -f $(VENV)/.torch-* && touch $@

$(STUDIO): | $(VENV)/.torch-$(KEY)
	@$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable .
	@rm -f $(VENV)/.studio-* && touch $@

$(TOOLS): | $(VENV)/.torch-$(KEY)
	@$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable ".[corpus,evaluate,test]"
	@rm -f $(VENV)/.studio-* $(VENV)/.tools-* && touch $@ $(STUDIO)

# The browser tests drive chromium; where the system has none, Playwright brings its own.
$(VENV)/.browser: | $(TOOLS)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| $(BIN)/python -m playwright install chromium
	@touch $@
