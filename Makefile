# make demo: bare clone -> environment -> the embedded demo.   make test: bare clone -> environment -> lint, docs, tests.
# Both share .venv, which is made once (the compiled part of mmcv takes 10 to 20 minutes on 2 cores).
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes of one thread each: more threads than cores wait for each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all docs env train-demo
demo: $(READY)
	$(BIN)/python demo/run.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mkdocs build --strict
	$(TESTS)

test-all: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mkdocs build --strict
	$(TESTS) -m ""

docs: $(READY)
	$(BIN)/mkdocs build --strict

train-demo: $(READY)
	$(BIN)/python demo/train.py

env: $(READY)

$(READY): requirements/build.txt requirements/lock.txt setup.py pyproject.toml psaq_mm/csrc/fake_quantize.cpp
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/build.txt
	@echo "installing mmcv: its operators are compiled here if no wheel is cached, 10 to 20 minutes on 2 cores"
	MMCV_WITH_OPS=1 $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation \
		-c requirements/lock.txt mmcv==2.1.0
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/lock.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	$(BIN)/python -m pip check
	$(BIN)/python -c "import psaq_mm, mmcv.ops, mmdet, mmseg, timm"
	touch $(READY)
