# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
RUNS ?= runs

.PHONY: demo test test-long check export notebooks docs bench clean

demo: $(READY)  ## Train a small network on digits; a folder with pictures and all else is left in runs/demo, or the next free name
	$(BIN)/learner train digits $(RUNS)/demo --new_name

test: $(READY) check  ## Everything that has to hold: export, notebooks, tests, style, types
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(READY)  ## The tests in their long forms: a stop after every batch, hundreds of kills; takes long
	$(BIN)/python -m pytest -n 2 --dist loadfile --long

check: $(READY)  ## The quick part of test: the export is up to date, notebooks are clean, style, types
	$(BIN)/python tests/check_export.py
	$(BIN)/ruff check
	$(BIN)/mypy

export: $(READY)  ## Notebooks to modules
	$(BIN)/nbdev-export

notebooks: $(READY)  ## Run every notebook in a real kernel and keep its outputs; NB=nbs/loop/learner.ipynb for one
	$(BIN)/python tests/run_notebooks.py $(NB)
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

docs: $(READY)  ## The documentation site in _docs; look at it with: python -m http.server -d _docs
	$(BIN)/python docs/build.py _docs

bench: $(READY)  ## Side-by-side timings; peers that are installed in .venv are timed too
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/commands.py

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	git rev-parse --git-dir >/dev/null 2>&1 && git config core.hooksPath .githooks || true
	touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info _docs .pytest_cache .mypy_cache .ruff_cache
