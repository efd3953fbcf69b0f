# Shoehorn. `make` without a target prints all targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help setup setup-dev demo test test-fast test-contract test-cluster test-container test-page test-chart test-openapi lint format docs dashboards lock audit sbom pin-base clean

VENV := .venv
PYTEST := PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin" $(VENV)/bin/pytest
# One more than processors, since tests wait for processes a third of their time; each may run an engine of 2 GB.
WORKERS ?= $(shell echo $$(($(shell nproc) < 4 ? $(shell nproc) + 1 : 4)))
PARALLEL := $(PYTEST) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
DEMO := $(CURDIR)/.demo
KERNEL := src/shoehorn_vllm/hybrid/kernel
HERE := not container and not gpu and not browser and not chart and not cluster

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## install the CPU engine and the shoehorn command into .venv, and nginx from the distribution
	@command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || \
	  { echo "installing nginx"; $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends nginx-light >/dev/null; \
	    [ ! -d /run/systemd/system ] || $(SUDO) systemctl disable --quiet --now nginx; } # only the program is needed, not the service
	requirements/install $(VENV) cpu
	[ $(VENV)/bin/shoehorn -nt pyproject.toml ] && [ -z "$$(find $(KERNEL) setup.py -newer $(VENV)/bin/shoehorn -name '*.[chp]*')" ] || \
	  $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e .

setup-dev: setup ## the same with the tools of tests and linters
	@command -v shellcheck >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends shellcheck >/dev/null; }
	@command -v haproxy >/dev/null || [ -x /usr/sbin/haproxy ] || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends haproxy >/dev/null; \
	    [ ! -d /run/systemd/system ] || $(SUDO) systemctl disable --quiet --now haproxy; } # only the program is needed, not the service
	@command -v promtool >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends prometheus >/dev/null; \
	    [ ! -d /run/systemd/system ] || $(SUDO) systemctl disable --quiet --now prometheus; } # only the program is needed, not the service
	requirements/install $(VENV) cpu dev

demo: setup ## serve the demo model on this machine's CPU in the foreground; stop with Ctrl-C
	@mkdir -p $(DEMO)/models
	[ -n "$${API_KEY:-}$${API_KEY_FILE:-}" ] || rm -f $(DEMO)/models/.shoehorn/keys.json # so that the printed curl contains a key
	export PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin"
	export MODEL_ID=$${MODEL_ID:-$(CURDIR)/demo/model} MODEL_SOURCE=$${MODEL_SOURCE:-local}
	export SERVED_MODEL_NAME=$${SERVED_MODEL_NAME:-shoehorn-demo} VRAM_PROFILE=$${VRAM_PROFILE:-cpu}
	export MODELS_DIR=$${MODELS_DIR:-$(DEMO)/models} RUN_DIR=$${RUN_DIR:-$(DEMO)/run}
	export ENGINE_LOG=$${ENGINE_LOG:-file} DRAIN_TIMEOUT=$${DRAIN_TIMEOUT:-3}
	exec $(VENV)/bin/python entrypoint.py

lint: setup-dev ## check style, types, shell scripts and language
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	shellcheck requirements/install requirements/install-helm requirements/lock tools/pin-base .ci/run
	$(VENV)/bin/python tools/lint_language.py

test: setup-dev ## run linters and all tests that need no browser, container engine or GPU; ARGS go to pytest
	@mkdir -p test-artefacts
	$(MAKE) --no-print-directory lint > test-artefacts/lint.log 2>&1 &
	lint=$$! failed=0
	trap 'kill $$lint 2>/dev/null || true' EXIT
	$(PARALLEL) -m "$(HERE) and not contract" --durations=15 $(ARGS) || failed=$$?
	wait $$lint || { failed=$$?; echo "lint failed:"; }
	cat test-artefacts/lint.log
	exit $$failed

test-fast: setup-dev ## run the tests that start no engine, gateway or appliance: 90 s at most
	@$(PARALLEL) -m "$(HERE) and not contract and not engine and not process" $(ARGS)

test-contract: setup-dev ## compare the installed vLLM with what Shoehorn assumes about it, and run Triton's kernels in its interpreter
	@requirements/install $(VENV)-triton triton
	@$(PARALLEL) -m contract $(ARGS)

test-container: setup-dev ## build the image and test it under a Docker engine
	@$(PYTEST) -m container tests/container $(ARGS)

test-cluster: setup-dev ## serve over two machines (network namespaces; needs root) with the real Ray and vLLM
	@command -v ip >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends iproute2 >/dev/null; }
	@$(PARALLEL) -m cluster tests/cluster --durations=10 $(ARGS)

test-page: setup-dev ## test the console page in Chromium, installed from the distribution
	@command -v chromium >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk >/dev/null; }
	@$(PARALLEL) -m browser tests/page $(ARGS)

test-chart: setup-dev ## test the chart for Kubernetes with Helm and the schemas of Kubernetes 1.29 to 1.37
	@command -v npm >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends npm >/dev/null; }
	@requirements/install $(VENV)-chart chart
	@requirements/install-helm $(VENV)-chart/bin
	@$(PARALLEL) -m chart tests/chart $(ARGS)

test-openapi: setup-dev ## fuzz the public API through the gateway with schemathesis; EXAMPLES=40 per endpoint
	requirements/install $(VENV)-openapi openapi
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin" $(VENV)/bin/python tools/fuzz_openapi.py $(VENV)-openapi/bin/schemathesis $${EXAMPLES:-40}

docs: setup ## regenerate the documents in docs/
	$(VENV)/bin/python tools/generate_docs.py

dashboards: setup-dev ## regenerate Grafana's dashboards
	$(VENV)/bin/python tools/dashboards.py

lock: setup ## regenerate the lock files in requirements/
	UV=$(VENV)/bin/uv requirements/lock

audit: setup ## check the locked packages for known vulnerabilities
	requirements/install $(VENV)-supply-chain supply-chain
	$(VENV)/bin/python tools/audit.py --pip-audit $(VENV)-supply-chain/bin/pip-audit $(ARGS)

sbom: setup ## write the bills of materials of both flavours' Python packages (the image contains its own)
	requirements/install $(VENV)-supply-chain supply-chain
	for flavour in gpu cpu; do $(VENV)-supply-chain/bin/python tools/sbom.py --lock requirements/$$flavour.txt --out sbom-$$flavour.json; done

pin-base: ## update the digests of the base images in the Dockerfile
	tools/pin-base

clean: ## remove environments, demo data and test results
	rm -rf $(VENV) $(VENV)-openapi $(VENV)-supply-chain $(VENV)-triton $(VENV)-chart $(DEMO) test-artefacts
