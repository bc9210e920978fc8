# `make` on its own says what there is.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

# pyright mentions newer versions of itself; ours is pinned.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test tests test-slow test-gpu gpu-report lint style types format clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(STAMP)  ## make .venv with everything for development

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv  ## decode a photograph with the small decoder: leaves demo/sheet.png
	$(BIN)/python tools/demo.py

# pyright takes one core a minute: side by side with the tests.
test: style  ## lint, types, and every test that needs no GPU and no minutes
	$(MAKE) --no-print-directory -j 2 types tests

tests: venv
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu and not slow'

# One test after another: some take all cores, or measure memory.
test-slow: venv  ## the tests that take minutes, and no GPU
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

test-gpu: venv  ## the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu || test $$? -eq 5  # 5: there are none

gpu-report: venv  ## check and measure on this GPU, 25 minutes at most: leaves gpu-report.json
	$(BIN)/python tools/gpu_report.py

CXX_FILES = git ls-files -co --exclude-standard '*.c' '*.h' '*.cc' '*.cpp' '*.hpp' '*.cu'

lint: style types  ## style, layout and types; changes nothing

style: venv
	$(BIN)/ruff check -q
	$(BIN)/ruff format -q --check
	@$(CXX_FILES) 2>/dev/null | xargs -r $(BIN)/clang-format --dry-run -Werror

types: venv
	$(BIN)/pyright

format: venv  ## lay out every file, and mend what can be mended
	$(BIN)/ruff check -q --fix
	$(BIN)/ruff format -q
	@$(CXX_FILES) 2>/dev/null | xargs -r $(BIN)/clang-format -i

clean:  ## remove what was made here, but not .venv
	rm -rf build dist demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
