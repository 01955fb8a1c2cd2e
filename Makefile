# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that `make test` runs side by side, a file of tests each, with one thread and about 2 GB of memory each.
# `make test WORKERS=0` is one process.
WORKERS ?= 2

.PHONY: install learn2learn demo test test-slow lint coverage build docs clean

install: $(STAMP)

$(STAMP): pyproject.toml anomalib_metarefine_plugins.pth
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"Python 3.10 to 3.13 is needed, found {sys.version.split()[0]}. Pass PYTHON=python3.11, say."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

# Optional: the other backend of meta-learning, and the reference that our own is tested against. 0.2.0 is the last
# release, and nothing promises that another one builds this way.
learn2learn: $(VENV)/.learn2learn

# First what it imports. Not all that it asks for (--no-deps): qpth pins numpy<2, and anomalib's packages need numpy 2.
# `build_ext` has its setup.py compile the .pyx files anew: the C files it ships don't compile from Python 3.11 on. Only
# the build by PEP 517 hands this word on, and fetches Cython.
$(VENV)/.learn2learn: $(STAMP)
	$(BIN)/pip install --quiet gym requests scipy tqdm
	$(BIN)/pip install --quiet --no-deps --no-binary learn2learn --use-pep517 \
		--config-settings=--build-option=build_ext learn2learn==0.2.0
	touch $@

demo: $(STAMP)
	$(BIN)/metarefine demo --out demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(STAMP)
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report

build: $(STAMP)
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

docs: $(STAMP)
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict --site-dir site

clean:
	rm -rf $(VENV) demo results site dist
