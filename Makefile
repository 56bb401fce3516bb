# Every target sets up what it needs: a virtual environment of its own with the tested versions. Re-runs are quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: demo test quick lint docs bench worlds clean

demo: $(VENV)/installed
	$(BIN)/retouch demo

test: $(VENV)/installed-dev
	$(BIN)/pytest -n 2

quick: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 -m "not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/installed-docs
	# these two speak of a future MkDocs, not of this build
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/installed
	$(BIN)/retouch bench --replicas 64
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

worlds: $(VENV)/installed
	$(BIN)/retouch worlds build digits

clean:
	rm -rf $(VENV) site retouch-demo retouch-bench

# torch: the build without CUDA where PyTorch's own index can be reached; else what pip finds.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch $$($(BIN)/python -c "import urllib.request as r; r.urlopen('$(CPU_WHEELS)/torch/', timeout=5); \
		print('--index-url $(CPU_WHEELS)')" 2>/dev/null)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --editable '.[docs]'
	touch $@
