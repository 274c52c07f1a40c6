# The two commands of a fresh machine are `make quickstart` and `make test`; both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FEAST := $(VENV)/feast/.installed
TORCH ?= torch==2.13.0
PARALLEL := -n 2 --dist loadfile

.PHONY: install quickstart test lint format clean

install: $(STAMP)

# torch first and alone, so that a CPU machine keeps its CPU build; packaging/fbgemm-cpu stands in
# for the CUDA wheel that TorchRec's metadata asks for. A CUDA machine says `make CUDA=1`.
$(STAMP): pyproject.toml packaging/fbgemm-cpu/pyproject.toml
	@echo "== installing into $(VENV) (about two minutes, 2 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifndef CUDA
	$(BIN)/python -m pip install --quiet "$(TORCH)" ./packaging/fbgemm-cpu
endif
	$(BIN)/python -m pip install --quiet -e ".[train,dev]"
	@echo "== preparing the local Triton server"
	$(BIN)/twotower setup-server
	@touch $(STAMP)

quickstart: install
	$(BIN)/twotower demo-log
	$(BIN)/twotower run --config configs/quickstart.yaml

# A feature server for the gateway's tests, in an environment of its own: Feast holds other libraries
# back (prometheus_client, pandas).
$(FEAST): | $(STAMP)
	$(PYTHON) -m venv $(VENV)/feast
	$(VENV)/feast/bin/python -m pip install --quiet "feast>=0.60,<1"
	@touch $(FEAST)

# Two processes of one thread each: most tests wait for processes of their own. The second run sends
# the kernels' tests through Triton's interpreter.
test: install $(FEAST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) -W ignore tests/kernels

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build .mypy_cache .ruff_cache .pytest_cache
