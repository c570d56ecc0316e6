# Every target that needs the environment makes it first, in .venv, and again when requirements/ or setup.py change.
# Settings, given in the environment or after `make`:
#   EXFM_DEVICE=cpu|gpu    which set of requirements/ to install; default: gpu where nvidia-smi works, else cpu
#   TORCH_INDEX_URL=URL    package index for torch alone, for a build that your usual index does not carry
#   PYTHON=python3.12      the interpreter that makes .venv; default: the first one found that is new enough
#   ARGS="..."             passed on to pytest, to the demo or to the benchmark

ifndef EXFM_DEVICE
EXFM_DEVICE := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
endif
ifeq ($(filter cpu gpu,$(EXFM_DEVICE)),)
$(error EXFM_DEVICE is '$(EXFM_DEVICE)'; use cpu or gpu)
endif
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
STAMP := .venv/.exfm-$(EXFM_DEVICE)
TORCH := $(shell grep '^torch==' requirements/common.txt)

.PHONY: help setup demo test test-slow test-multigpu check bench bench-guard clean
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)  ## make .venv for this machine and verify it

demo: $(STAMP)  ## teacher, supervision, students and a report, small
	$(BIN)/exfm demo $(ARGS)

test: $(STAMP)  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)  ## the cases that `make test` leaves out: more engines, ranks and kills
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

test-multigpu: $(STAMP)  ## every engine, precision and pipeline on this host's GPUs, against one rank and gloo
	$(BIN)/exfm bench multigpu $(ARGS)

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p exfm

bench: $(STAMP)  ## what distillation buys and costs, in minutes
	$(BIN)/exfm bench distill --quick $(ARGS)

bench-guard: $(STAMP)  ## key ratios beside the kept ones; fails on a loss beyond noise
	$(BIN)/exfm bench guard $(ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist exfm.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv made for the other device is made anew: pip would keep the torch build that it finds there.
$(STAMP): requirements/common.txt requirements/$(EXFM_DEVICE).txt requirements/dev.txt setup.py
	@test -n "$(PYTHON)" || { echo "exfm needs Python 3.11 or newer and found none; install one and say: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@if [ -e .venv/.device ] && [ "$$(cat .venv/.device)" != $(EXFM_DEVICE) ]; then echo "set-up: .venv is for another device, making it anew"; rm -rf .venv; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "'$(PYTHON) -m venv' failed: install your system's venv package for it (Debian: python3-venv)" >&2; exit 1; }
	@echo $(EXFM_DEVICE) >.venv/.device
	@echo "set-up of .venv for $(EXFM_DEVICE), a minute or two: $(TORCH)"
	@$(PIP) $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') '$(TORCH)'
	@echo "set-up: its libraries, torchrec, fbgemm, exfm"
	@$(PIP) -r requirements/common.txt -r requirements/dev.txt
	@$(PIP) --no-deps -r requirements/$(EXFM_DEVICE).txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m exfm.launch.doctor
	@touch $@
