# make demo [DATA=folder]   set everything up and run the whole funnel, from logs to served winners
# make test                 set everything up and run every check that takes minutes, not hours
PYTHON ?= python3
STORE  ?= store
BIN    := .venv/bin
# the CPU build of torch is what the pin resolves to on a CPU-only index; docs/install.md has the CUDA build
TORCH  := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench stubs clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml setup.py $(wildcard prerank/kernels/native/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"prerank needs Python 3.11 or later, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv (torch first, by its exact version)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: .venv/.installed ## a virtual environment in .venv with everything in it

demo: setup ## the whole funnel on DATA=folder (KuaiRand-Pure), or on a simulated ad market
	$(BIN)/prerank demo --store $(STORE) $(if $(DATA),--data $(DATA))

lint: setup ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint and the tests
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow and not gpu and not alone'
	$(BIN)/pytest -m 'alone and not slow and not gpu'

test-slow: setup ## the tests that take minutes
	$(BIN)/pytest -m slow

bench: setup ## every benchmark, ending in one table
	$(BIN)/python -m benchmarks

STUBS := prerank/serve/grpc_stubs
stubs: setup ## the messages of open_inference.proto, generated again
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools>=1.81.1,<1.82'
	$(BIN)/python -m grpc_tools.protoc -I $(STUBS) --python_out=$(STUBS) --pyi_out=$(STUBS) open_inference.proto
	@# in a pool of their own: a client's library in the same process may bring messages of the same names
	sed -i 's/_descriptor_pool.Default()/_descriptor_pool.DescriptorPool()/' $(STUBS)/open_inference_pb2.py

clean: ## remove what make made, but no store
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
