# Two targets do everything on a fresh Debian 12: `sudo make demo` and `sudo make test`.
# Everything else is a step of those, and each step is quick when there is nothing to do.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PYTHON := /usr/bin/python3

# What the product needs from Debian: Python, the libraries it speaks to the kernel with (those for the legacy
# tables come with iptables), and the compilers for the eBPF programs, the CNI plugin and python-iptables. The lab's
# users also want something to send requests with, and the tests look at the rules with nft, iptables-legacy and
# ipset, which the product itself does not start.
PACKAGES := python3 python3-venv libbpf1 libnftables1 iptables \
	clang llvm libbpf-dev linux-libc-dev libc6-dev gcc musl-tools python3-dev \
	ca-certificates curl iproute2 ipset nftables openssl

# What only `tidegate trace` needs, as its document tells people to install it (docs/trace.md): headers of any kernel do.
# And what shows a test the system calls of a process.
TEST_PACKAGES := python3-bpfcc linux-headers-$$(dpkg --print-architecture) strace

# What reads the Vagrantfile.
VAGRANT_PACKAGES := vagrant

# What the benchmarks have beside their own.
BENCH_PACKAGES := iperf3

# A virtual environment holds absolute paths: it is made again when the repository has moved.
STAMP := $(VENV)/ready
FINGERPRINT = $$(echo "$(CURDIR)" | cat - pyproject.toml | sha256sum | cut -d' ' -f1)

.PHONY: help setup packages packages-of-tests packages-of-vagrant packages-of-bench venv bpf cni demo test lint unit bench fuzz soak vm live runtimes image test-vm clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: packages venv bpf cni ## install what is needed, build the eBPF programs and the CNI plugin

packages:
	@missing=$$(for p in $(PACKAGES); do \
	    dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	    [ "$$(id -u)" = 0 ] || { echo "setup needs root to install:" $$missing >&2; exit 1; }; \
	    echo "installing from Debian, which takes about a minute:" $$missing; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -qq update && apt-get -qq install -y --no-install-recommends $$missing >/dev/null; \
	fi

packages-of-tests: packages
	@$(MAKE) --silent --no-print-directory packages PACKAGES="$(TEST_PACKAGES)"

packages-of-vagrant: packages
	@$(MAKE) --silent --no-print-directory packages PACKAGES="$(VAGRANT_PACKAGES)"

packages-of-bench: packages
	@$(MAKE) --silent --no-print-directory packages PACKAGES="$(BENCH_PACKAGES)"

venv: packages
	@if [ "$$(cat $(STAMP) 2>/dev/null)" != "$(FINGERPRINT)" ]; then \
	    echo "making the Python environment .venv, which takes about a minute"; \
	    rm -rf $(VENV); $(PYTHON) -m venv $(VENV); \
	    $(BIN)/pip install --quiet --upgrade pip setuptools wheel; \
	    $(BIN)/pip install --quiet --editable '.[lab,trace,dev]'; \
	    echo "$(FINGERPRINT)" > $(STAMP); \
	fi

bpf: packages
	@$(MAKE) --silent --no-print-directory -C bpf

cni: packages
	@$(MAKE) --silent --no-print-directory -C init/cni

demo: setup ## the whole story in a lab of two nodes; leaves nothing behind
	@$(BIN)/python -m tidegate.lab.demo

# Tests of the kernel wait most of their time: those that need nothing of it run meanwhile.
test: setup packages-of-tests lint ## every test (needs root for the kernel and lab tests)
	@[ "$$(id -u)" = 0 ] || { echo "the tests make network namespaces: run sudo make test" >&2; exit 1; }
	@mkdir -p build; $(BIN)/pytest -q tests/unit >build/unit.txt 2>&1 & unit=$$!; trap "kill $$unit 2>/dev/null" EXIT; \
	failed=0; $(BIN)/pytest -q tests/e2e tests/kernel || failed=1; \
	wait $$unit || failed=1; trap - EXIT; cat build/unit.txt; exit $$failed

unit: setup ## only the tests that need no root
	@$(BIN)/pytest -q tests/unit

lint: setup ## style and types
	@$(BIN)/ruff check agent tests
	@$(BIN)/ruff format --check agent tests
	@$(BIN)/mypy

bench: setup packages-of-bench ## measurements, as ratios with medians
	@$(BIN)/python -m tests.bench

fuzz: setup ## the classifier against its reference: a million random streams, STREAMS and SEED to choose others
	@$(BIN)/python -m tests.fuzz --streams $${STREAMS:-1000000} --seed $${SEED:-$$RANDOM}

soak: setup ## long runs: 2,000 apply and remove cycles, 500 random policies, 200 flips under load, killed agents, churn of pods
	@TIDEGATE_SOAK=1 $(BIN)/pytest -q --timeout 1800 tests/kernel/test_redirect_faults.py
	@TIDEGATE_POLICIES=500 TIDEGATE_SEED=$$RANDOM $(BIN)/pytest -q --timeout 1800 \
	    tests/kernel/test_redirect_properties.py
	@TIDEGATE_SOAK=1 $(BIN)/pytest -q --timeout 600 tests/kernel/test_sidecar_flips.py
	@TIDEGATE_SOAK=1 TIDEGATE_SEED=$$RANDOM $(BIN)/pytest -q --timeout 1800 \
	    tests/kernel/test_ledger_sums.py
	@TIDEGATE_SOAK=1 TIDEGATE_RUNTIMES=1 $(BIN)/pytest -q --timeout 1800 tests/runtimes/test_churn.py

vm: setup packages-of-tests ## a choice of tests under Debian's kernel 6.1, in a virtual machine
	@$(BIN)/python -m tests.vm

live: setup ## real clients against real servers; tshark and `tidegate classify` have to agree
	@[ "$$(id -u)" = 0 ] || { echo "the servers run in network namespaces: run sudo make live" >&2; exit 1; }
	@TIDEGATE_LIVE=1 $(BIN)/pytest -q tests/live

# Containers, images and machines: what these need is unpacked below build/, and nothing is installed.
AS_ROOT = [ "$$(id -u)" = 0 ] || { echo "this needs root: run sudo make $@" >&2; exit 1; }

runtimes: setup ## real containerd and podman through the CNI plugin: first packets, faults, a cluster's API, churn
	@$(AS_ROOT)
	@TIDEGATE_RUNTIMES=1 $(BIN)/pytest -q tests/runtimes

image: setup ## the container image: built, looked at, run
	@$(AS_ROOT)
	@TIDEGATE_IMAGE=1 $(BIN)/pytest -q -s tests/image

test-vm: setup packages-of-vagrant ## Debian 12 under systemd in virtual machines: installed, rebooted, and never open
	@$(AS_ROOT)
	@TIDEGATE_VM=1 $(BIN)/python -m pytest -q -s tests/vm

clean: ## remove what setup and the tests made in this checkout
	@rm -rf .venv build agent/tidegate/bpf agent/tidegate/plugins agent/tidegate.egg-info \
	    .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find agent tests -name __pycache__ -type d -prune -exec rm -rf {} +
