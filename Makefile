# Every target creates what it needs; `make serve` and `make test` are all a newcomer has to type.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
# Whole files go to one worker each, so that what a file's tests see of each other never depends on timing.
SIDE_BY_SIDE := -n 2 --dist loadfile
# A test of processes and clocks may fail on a machine that is kept from computing. It may be run again, three in a suite;
# the summary says so, with the first failure. ARGS=--fail-on-flaky makes that a failure.
AGAIN := --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks
FAST := $(BIN)/pytest -m "not slow" $(SIDE_BY_SIDE) $(AGAIN)
REFERENCES := auto-gptq==0.7.1 autoawq==0.2.9  # single files of them; what they depend on is large, old and not needed
CLIENTS := text-generation==0.7.0  # TGI's own; it asks for an older huggingface_hub, and runs with ours
GUIDELLM := guidellm==0.8.1  # wants older versions of packages that we have: in an environment of its own over ours
ARM64 := g++-aarch64-linux-gnu qemu-user  # Debian's packages: the kernels run on an emulated arm64, too
PACKAGES := import site; print(site.getsitepackages()[0])
BROWSER := chromium  # Debian's, too: the page is tested in it
NONE_IS_FINE := || [ $$? -eq 5 ]  # ARGS may choose tests of one tier only

# Else every process that a test starts compiles what it imports of moe_ray, and pytest every file of tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve chat test test-fast test-fast-torch test-slow check format protos venv arm64 browser clean

serve: venv  ## serve the demo model at http://127.0.0.1:8000 (ARGS="--port 9000" passes flags on)
	$(BIN)/moe-ray serve $(ARGS)

chat: venv  ## chat with the running server in this terminal
	$(BIN)/moe-ray chat $(ARGS)

.NOTPARALLEL:
test: test-fast test-slow  ## the whole test suite, what fails soon first (ARGS="tests/engine" passes arguments to pytest)

test-fast: venv browser  ## all that is proven without Ray: 8 to 14 minutes on two cores
	$(FAST) $(ARGS) $(NONE_IS_FINE)

test-fast-torch: venv  ## the same as on a CPU that moe_ray has no kernels for: torch computes
	$(FAST) --plain-cpu $(ARGS) $(NONE_IS_FINE)

test-slow: venv arm64 browser  ## long computing, side by side; then Ray, servers, processes that are killed, parity through all of it
	$(BIN)/pytest -m "slow and apart" $(SIDE_BY_SIDE) $(ARGS) $(NONE_IS_FINE)
	$(BIN)/pytest -m "slow and not apart" $(AGAIN) $(ARGS) $(NONE_IS_FINE)

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
	$(BIN)/pip install --no-deps --no-build-isolation $(REFERENCES) || echo "$(REFERENCES): tests that read as they do are skipped"
	$(BIN)/pip install -e ".[clients]" || echo "without the extra clients, tests with those programs are skipped"
	$(BIN)/pip install -e ".[finetune]" || echo "without the extra finetune, tests of examples/finetune are skipped"
	$(BIN)/pip install --no-deps $(CLIENTS) || echo "$(CLIENTS): tests with it are skipped"
	{ $(PYTHON) -m venv $(VENV)/guidellm \
	  && $(BIN)/python -c "$(PACKAGES)" > $$($(VENV)/guidellm/bin/python -c "$(PACKAGES)")/ours.pth \
	  && $(VENV)/guidellm/bin/pip install $(GUIDELLM); } || echo "$(GUIDELLM): tests with it are skipped"
	@touch $@

arm64:  # as root on Debian; else the tests that need it are skipped
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null || { apt-get -qq update && apt-get -qq install -y $(ARM64); } \
	  || echo "without $(ARM64) the kernels are not run on arm64"

browser:  # as root on Debian; else the tests that need it are skipped
	@command -v $(BROWSER) > /dev/null || { apt-get -qq update && apt-get -qq install -y $(BROWSER); } \
	  || echo "without $(BROWSER) the page is not tested"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
