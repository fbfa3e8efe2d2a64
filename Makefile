# Every target creates what it needs; `make serve` and `make test` are all a newcomer has to type.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: serve chat test check format protos venv clean

serve: venv  ## serve the demo model at http://127.0.0.1:8000 (ARGS="--port 9000" passes flags on)
	$(BIN)/moe-ray serve $(ARGS)

chat: venv  ## chat with the running server in this terminal
	$(BIN)/moe-ray chat $(ARGS)

test: venv  ## the whole test suite
	$(BIN)/pytest $(ARGS)

check: venv  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: venv  ## regenerate moe_ray/pb from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=moe_ray/pb --pyi_out=moe_ray/pb --grpc_python_out=moe_ray/pb protos/moe_ray.proto
	sed -i 's/^import moe_ray_pb2 as/from moe_ray.pb import moe_ray_pb2 as/' moe_ray/pb/moe_ray_pb2_grpc.py

.PHONY: docs
docs: venv  ## write docs/configuration.md anew from moe_ray/config
	$(BIN)/python docs/generate_configuration.py

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
