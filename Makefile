# Every target sets up what it needs. PYTHON picks the interpreter (3.11 to 3.13), WORKERS how many tests run at once.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: setup book read test bench lint clean

setup: .venv/.stamp

.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Tokenbook needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

book: setup          ## execute what is stale, then render: _build/html/index.html
	$(BIN)/tokenbook build

read: setup          ## render the committed results, execute nothing
	$(BIN)/jupyter-book build .
	@echo "Open _build/html/index.html"

test: setup          ## file by file, WORKERS at a time
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

bench: setup
	$(BIN)/python -m benchmarks
	$(BIN)/python -m tokenbook.pages

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:               ## rendered pages and caches; finished runs stay (they are in runs/)
	rm -rf _build .pytest_cache .ruff_cache
	find lib tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
