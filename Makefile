# Two commands do everything on a fresh machine with Python 3.11, make and a network:
#   make demo    make test
PYTHON ?= python3.11
VENV ?= .venv
GPU_PYTHON ?= python3
RUN = $(VENV)/bin/python
BENCH ?=
JOBS ?= 2
LOGDIR ?= runs/digits
GALLERY ?= runs/gallery
EXAMPLES ?= runs/examples
SCREENSHOTS ?= runs/screenshots
DOCS ?= build/docs
WORKERS ?= 2

USES = choose_optimizer compare_architectures ensemble fine_tune label_noise warmup

.PHONY: install demo check-demo check-browser report gallery examples $(USES) test test-slow test-gpu coverage mutations mutations-changed \
	lint check-environments docs check-docs notebooks notebooks-write bench \
	bench-accuracy bench-first-run bench-overhead bench-memory bench-scale bench-endurance bench-blindness bench-smoke clean

install: $(VENV)/installed

# pip takes the CPU build of torch through constraints.txt.
$(VENV)/installed: pyproject.toml constraints.txt requirements-peers.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Other libraries, which tests and benchmarks compare with; --no-deps, or torchvision comes along.
	$(RUN) -m pip install --quiet --no-deps --constraint constraints.txt -r requirements-peers.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt einops opt-einsum jaxtyping tqdm
	touch $@

demo: install
	$(RUN) examples/digits.py --logdir $(LOGDIR)

# Reads the demo's event files back and fails if something promised is not in them.
check-demo: install
	$(RUN) tests/check_demo.py $(LOGDIR)

# Looks at TensorBoard and the report in Chromium; needs chromium and chromedriver.
check-browser: install
	$(RUN) -m tests.browser.check $(LOGDIR) $(SCREENSHOTS)

# One HTML page about the demo's first run.
report: install
	$(RUN) -m lightning_landscape.report $(LOGDIR)/watch

# Every kind of picture, from real runs.
gallery: install
	$(RUN) examples/gallery.py --out $(GALLERY)

# What people decide by looking at landscapes; each checks its own claims: 2 minutes at most.
examples: $(USES)

$(USES): install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
		$(RUN) examples/$@.py --logdir $(EXAMPLES)/$@ --picture $(EXAMPLES)/$@.png

# One thread each: small kernels spend most of their time waiting for the others.
test: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest \
		--numprocesses $(WORKERS) --dist worksteal -m "not slow"

# Long trainings, many processes or measurements: what is marked so.
test-slow: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest \
		--numprocesses $(WORKERS) --dist worksteal -m slow

# On a machine with a GPU, in an environment of yours whose torch has CUDA (`make install` gives one
# without): what only a GPU can show, the zoo and the runs of test_isolation there.
test-gpu:
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(GPU_PYTHON) -m pytest --device cuda \
		--numprocesses $(WORKERS) --dist worksteal tests/gpu tests/integration/test_zoo.py \
		tests/integration/test_isolation.py tests/geometry/test_second_derivatives.py

# All tests, and which lines and branches of the package it runs, processes that tests start included.
coverage: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest \
		--numprocesses $(WORKERS) --dist worksteal \
		--cov=lightning_landscape --cov-branch --cov-report=term --cov-fail-under=95

# Takes out one guard of the promises at a time; a test must miss it.
mutations: install
	$(RUN) -m tests.mutations --jobs $(JOBS)

# Those whose source or tests changed since the last `make mutations`, and a tenth of the others.
mutations-changed: install
	$(RUN) -m tests.mutations --changed --jobs $(JOBS)

# The wheel in new virtual environments: pytorch-lightning alone, lightning, the oldest of everything.
check-environments: install
	$(RUN) -m tests.environments.build

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	# What a user's code gets from the types, seen from outside the package.
	cd .ci && $(abspath $(RUN)) -m mypy --strict --cache-dir ../.mypy_cache user_types.py

# The documentation as a web site that asks for nothing from the network; a warning is an error.
docs: $(VENV)/docs-installed
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet -E docs $(DOCS)
	@echo "Open $(DOCS)/index.html"

# The notebooks of the documentation from scratch: each checks its own claims; a minute.
notebooks notebooks-write: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
		$(RUN) docs/notebooks/execute.py $(if $(filter notebooks-write,$@),--write)

# Each page in Chromium, light and dark: formulas, pictures, widths, no request to the network.
check-docs: docs
	$(RUN) -m tests.browser.docs $(DOCS) $(SCREENSHOTS)

$(VENV)/docs-installed: pyproject.toml constraints.txt | install
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# What everything costs, beside the peers: the tables of docs/costs.md, in 40 minutes of an idle machine.
bench: install $(VENV)/landscaper
	PYTHONPATH=$(VENV)/landscaper $(RUN) -m benchmarks $(BENCH)

# Apart, because one of its requirements takes no numpy 2; where it does not install, the table says so.
$(VENV)/landscaper: requirements-landscaper.txt | install
	-$(RUN) -m pip install --quiet --no-deps --upgrade --target $@ -r requirements-landscaper.txt
	mkdir -p $@ && touch $@

bench-accuracy: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.accuracy

# Whole runs beside the same without callbacks; hours in full, see the file for parts.
bench-overhead: install
	$(RUN) -m benchmarks.overhead $(BENCH)

bench-first-run: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.first_run $(BENCH)

bench-memory: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.memory $(BENCH)

bench-scale: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.scale $(BENCH)

# 5,000 steps with a measurement each: time, memory and files by thirds of the run; two minutes.
bench-endurance: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.endurance $(BENCH)

# Eigenvalues along trainings with decoupled parts against dense Hessians, and of known spectra.
bench-blindness: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.blindness $(BENCH)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m benchmarks.spectra

# That all of these run, on a little of each.
bench-smoke: install
	$(RUN) -m benchmarks --quick --only eigenvalue-mlp pictures
	$(RUN) -m benchmarks.accuracy --quick
	$(RUN) -m benchmarks.overhead --quick
	$(RUN) -m benchmarks.first_run --quick
	$(RUN) -m benchmarks.memory --quick
	$(RUN) -m benchmarks.scale --largest 2e4
	$(RUN) -m benchmarks.endurance --steps 60
	$(RUN) -m benchmarks.blindness --quick
	$(RUN) -m benchmarks.spectra --spectra 12 --ks 1 3

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
