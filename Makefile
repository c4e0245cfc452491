# make demo | make test | make long | make slow | make lint | make docs | make speed: each sets up what it needs, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What the environment takes, so that a full disk is told before minutes of installing
VENV_MB ?= 6600
# A small demo for CI: make demo DEMO=small
DEMO   ?= full

# New files must reach the strict editable install; a folder's time changes when a file comes or goes.
FOLDERS := $(shell find ssl3d proxies benchmarks -type d -not -name __pycache__ -not -path 'benchmarks/results*')

.PHONY: setup test long slow lint docs demo speed clean

# Tests run in so many processes, each on one thread: a core for each, but no more than four (each may take 2 GB).
TEST_WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); test "$$n" -lt 4 && echo "$$n" || echo 4)

# Where the real scans are; the benchmarks make their own where there are none.
DATA   ?= ../shared/data

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt $(FOLDERS)
	@command -v "$(PYTHON)" >/dev/null || { echo "make: no $(PYTHON) here; name one with PYTHON=, such as make test PYTHON=python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; ok = (3, 11) <= v < (3, 14); ok or print("make: ssl3d needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d; choose one with PYTHON=, such as make test PYTHON=python3.11" % v[:2], file=sys.stderr); sys.exit(0 if ok else 2)'
	@test -x $(BIN)/python || { free=$$(df -Pk "$(dir $(abspath $(VENV)))" | awk 'NR == 2 { print int($$4 / 1024) }'); test "$$free" -ge $(VENV_MB) || { echo "make: $$free MB free where $(VENV) goes, and the environment takes $(VENV_MB) MB (most of it torch with CUDA): make room, or put it on another disk with VENV=/there/venv" >&2; exit 2; }; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=strict -e ".[dev]"
	@touch $@

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile

# The tests that take 4 seconds and more: notebooks, the tutorial, commands killed and shared by processes.
long: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long -n $(TEST_WORKERS) --dist loadfile

slow: $(VENV)/.ready
	$(BIN)/pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=strict -e ".[dev,docs]"
	@touch $@

# The site, under docs/_build/html. Strict, and always whole: a page that did not change may refer to one that did.
docs: $(VENV)/.docs
	@rm -rf docs/_build
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

ifeq ($(DEMO),small)
DEMO_SIZE := --data phantoms:60 --steps 40
else
DEMO_SIZE := --data phantoms:150 --steps 300
endif

demo: $(VENV)/.ready
	$(BIN)/ssl3d pretrain --proxy sorting --encoder resnet10 --resnet10.width 16 $(DEMO_SIZE) --out demo/run --overwrite
	$(BIN)/ssl3d linear-probe demo/run $(firstword $(subst --steps,,$(DEMO_SIZE))) $(word 2,$(DEMO_SIZE)) --target masks --out demo/results --overwrite
	@$(BIN)/python benchmarks/scripts/demo_summary.py demo/run demo/results

speed: $(VENV)/.ready
	$(BIN)/python benchmarks/scripts/speed_data.py
	$(BIN)/python benchmarks/scripts/speed_encoder.py
	$(BIN)/python benchmarks/scripts/speed_views.py
	$(BIN)/python benchmarks/scripts/speed_proxies.py --data $(or $(wildcard $(DATA)/hippocampus),phantoms:64)
	$(BIN)/ssl3d pretrain --proxy simclr --data $(or $(wildcard $(DATA)/hippocampus),phantoms) --steps 20 --eval-every -1 --out demo/speed --overwrite

clean:
	rm -rf $(VENV) docs/_build build dist demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
