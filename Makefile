# Shoehorn. `make` alone prints what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help setup setup-dev demo test test-container test-page test-openapi lint format docs dashboards lock audit sbom pin-base clean

VENV := .venv
PYTEST := $(VENV)/bin/pytest
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
DEMO := $(CURDIR)/.demo
HERE := not container and not gpu and not browser

help: ## print this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## make .venv with the CPU engine and the shoehorn command; install nginx from the distribution
	@command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || \
	  { echo "installing nginx"; $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends nginx-light >/dev/null; \
	    [ ! -d /run/systemd/system ] || $(SUDO) systemctl disable --quiet --now nginx; } # the service is not wanted
	requirements/install $(VENV) cpu
	[ $(VENV)/bin/shoehorn -nt pyproject.toml ] || $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e .

setup-dev: setup ## the same and what tests and linters need
	@command -v shellcheck >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends shellcheck >/dev/null; }
	@command -v promtool >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends prometheus >/dev/null; \
	    [ ! -d /run/systemd/system ] || $(SUDO) systemctl disable --quiet --now prometheus; } # the service is not wanted
	requirements/install $(VENV) cpu dev

demo: setup ## serve the demo model on this machine's CPU, in the foreground; Ctrl-C ends it
	@mkdir -p $(DEMO)/models
	[ -n "$${API_KEY:-}$${API_KEY_FILE:-}" ] || rm -f $(DEMO)/models/.shoehorn/keys.json # so that the curl has a key in it
	export PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin"
	export MODEL_ID=$${MODEL_ID:-$(CURDIR)/demo/model} MODEL_SOURCE=$${MODEL_SOURCE:-local}
	export SERVED_MODEL_NAME=$${SERVED_MODEL_NAME:-shoehorn-demo} VRAM_PROFILE=$${VRAM_PROFILE:-cpu}
	export MODELS_DIR=$${MODELS_DIR:-$(DEMO)/models} RUN_DIR=$${RUN_DIR:-$(DEMO)/run}
	export ENGINE_LOG=$${ENGINE_LOG:-file} DRAIN_TIMEOUT=$${DRAIN_TIMEOUT:-3}
	exec $(VENV)/bin/python entrypoint.py

lint: setup-dev ## ruff, mypy --strict, shellcheck, language
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python tools/lint_language.py
	$(VENV)/bin/mypy
	shellcheck requirements/install requirements/lock tools/pin-base .ci/run

test: lint ## everything that needs no container engine and no GPU; ARGS goes to pytest
	@export PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin"
	$(if $(ARGS),exec $(PYTEST) -m "$(HERE)" $(ARGS))
	mkdir -p test-artefacts
	nice $(PYTEST) -m "$(HERE)" --ignore tests/appliance --ignore tests/gateway > test-artefacts/unit.log 2>&1 & # these compute, while the others mostly wait
	unit=$$! failed=0
	$(PYTEST) -m "$(HERE)" tests/gateway tests/appliance/test_[d-o]*.py > test-artefacts/second.log 2>&1 &
	second=$$!
	trap 'kill $$unit $$second 2>/dev/null || true' EXIT
	$(PYTEST) -m "$(HERE)" tests/appliance/test_[p-z]*.py || failed=$$?
	wait $$second || failed=$$?
	wait $$unit || failed=$$?
	cat test-artefacts/second.log test-artefacts/unit.log
	exit $$failed

test-container: setup-dev ## the real image under a real Docker engine
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin" $(PYTEST) -m container tests/container $(ARGS)

test-page: setup-dev ## the console page in Chromium, which is installed from the distribution
	@command -v chromium >/dev/null || \
	  { $(SUDO) apt-get update -qq; $(SUDO) apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk >/dev/null; }
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin" $(PYTEST) -m browser tests/page $(ARGS)

test-openapi: setup-dev ## fuzz the public API with schemathesis through the gateway; EXAMPLES=40 for each endpoint
	requirements/install $(VENV)-openapi openapi
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH:/usr/sbin" $(VENV)/bin/python tools/fuzz_openapi.py $(VENV)-openapi/bin/schemathesis $${EXAMPLES:-40}

docs: setup ## write the generated documents anew
	$(VENV)/bin/python tools/generate_docs.py

dashboards: setup-dev ## write Grafana's dashboards anew
	$(VENV)/bin/python tools/dashboards.py

lock: setup ## make the hash locks in requirements/ anew
	UV=$(VENV)/bin/uv requirements/lock

audit: setup ## look the locks' packages up among known vulnerabilities
	requirements/install $(VENV)-supply-chain supply-chain
	$(VENV)/bin/python tools/audit.py --pip-audit $(VENV)-supply-chain/bin/pip-audit $(ARGS)

sbom: setup ## write bills of materials of both flavours' Python packages (the image carries its own, with Debian's)
	requirements/install $(VENV)-supply-chain supply-chain
	for flavour in gpu cpu; do $(VENV)-supply-chain/bin/python tools/sbom.py --lock requirements/$$flavour.txt --out sbom-$$flavour.json; done

pin-base: ## write the base images' present digests into the Dockerfile
	tools/pin-base

clean: ## remove what make made
	rm -rf $(VENV) $(VENV)-openapi $(VENV)-supply-chain $(DEMO) test-artefacts
