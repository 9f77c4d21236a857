# Everything runs in a virtual environment that tools/setup_env.py makes and keeps up to date.
#
#   PORT=8001              port of the demo's server
#   PYTHON=python3.12      Python for a new environment (3.11 to 3.13)
#   VENV=/path             where the environment lies
#   VLLM_VERSION=0.28.0    another release of vLLM, in an environment of its own
#   TORCH_INDEX=URL        PyTorch's index of CPU wheels, for machines without a GPU
#   WORKERS=1              tests at the same time; each may start a vLLM, with 4 GB of memory
#   DEMO_ARGS, PYTEST_ARGS more arguments (DEMO_ARGS='-- --enforce-eager' reaches vllm serve)

SHELL := /bin/bash
PORT ?= 8000
VLLM_VERSION ?=
TORCH_INDEX ?=
VENV ?= .venv$(if $(VLLM_VERSION),-vllm-$(VLLM_VERSION))
WORKERS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=

# The first Python here that is new enough; setup_env.py explains it when none is.
FIND_PYTHON := for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo "$$p" && exit; done; echo python3
PYTHON ?= $(shell $(FIND_PYTHON))

SETUP = $(PYTHON) tools/setup_env.py --venv "$(VENV)" --vllm-version "$(VLLM_VERSION)" \
	--torch-index "$(TORCH_INDEX)"
BIN = $(VENV)/bin

# vLLM on the CPU, without a network and with small caches.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
# One thread each: two engines that wait for each other's cores are slower than one.
CPU_ENV = VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} OMP_NUM_THREADS=1 \
	VLLM_CPU_OMP_THREADS_BIND=nobind
# A file's tests share servers and engines, so one worker takes all of them.
PYTEST = $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test pytest lint lint-deploy format docs test-compat test-gpu \
	dist clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: ## serve the model of this repository in int4, ask it for a text, stop
	@$(PYTHON) tools/demo.py --check --port $(PORT) $(DEMO_ARGS)
	@$(SETUP)
	@$(BIN)/python tools/demo.py --port $(PORT) $(DEMO_ARGS)

test: lint docs pytest ## lint, the documentation, then the whole CPU test suite

setup:
	@$(SETUP)

setup-test:
	@$(SETUP) --test

pytest: setup-test ## the CPU tests alone
	$(CPU_ENV) $(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-compat: setup-test ## the tests marked compat, as in: make test-compat VLLM_VERSION=0.28.0
	$(CPU_ENV) $(PYTEST) -m "compat and not gpu" $(PYTEST_ARGS)

test-gpu: setup-test ## the tests that need a GPU
	$(BIN)/python -m pytest tests -m gpu $(PYTEST_ARGS)

lint: setup-test lint-deploy ## formatting, style, types, workflows, what is in docker/
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

SCHEMAS = tests/deploy/schemas
lint-deploy: setup-test ## the Dockerfile, compose files and resources for clusters alone
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.*.yml
	$(BIN)/check-jsonschema --schemafile $(SCHEMAS)/ServingRuntime.json docker/*/serving-runtime.yaml
	$(BIN)/check-jsonschema --schemafile $(SCHEMAS)/InferenceService.json \
		docker/*/inference-service.yaml

format: setup-test ## put formatting and imports right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup-test ## the documentation, into build/docs; links and anchors are checked
	@# Not --quiet: that hides warnings from --strict as well.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_site.py build/docs

# An environment of its own: vLLM is not needed, and must not be.
dist: ## the source distribution and the wheel, checked, in dist/
	rm -rf dist build
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet '.[release]'
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*

clean: ## remove environments, caches and logs
	rm -rf .venv .venv-* .venv*.lock .venv*-setup.log build dist *.egg-info .*_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -type d -exec rm -rf {} +
