# The whole interface to building, checking and running. CI calls only these.
#
# Needs: Rust, Python 3, a C compiler. `make doctor` says what is missing,
# `make setup` gets it.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON = $$(source scripts/toolchain.sh; find_python || echo python3)

##@ Run

.PHONY: run
run: ## Envoy, sidecar and three simulated engines; sends a conversation, stays up
	@scripts/run.sh

.PHONY: smoke
smoke: module ## The same, bounded and asserting: last line "N passed, N failed"
	@scripts/stack.sh smoke

##@ Set up

.PHONY: doctor
doctor: ## What is there, what is missing, and the command for it
	@scripts/setup.sh doctor

.PHONY: setup
setup: ## Run those commands (into .venv and .cache; Debian packages as root)
	@scripts/setup.sh install

.PHONY: setup-run
setup-run: # What `make run` needs: `make setup` without the test tools.
	@scripts/setup.sh install run

##@ Build

.PHONY: build
build: module ## The module and the native programs
	@cargo build --workspace --bins --locked

.PHONY: wasm
wasm: module module-hf ## Both modules: target/warmpath.wasm, target/warmpath-hf.wasm

.PHONY: module
module: # The module that most need.
	@scripts/build-module.sh

.PHONY: module-hf
module-hf: # The module with Hugging Face's tokenizer engine inside.
	@scripts/build-module.sh hf

.PHONY: image
image: module ## The module as an OCI image with its bill of materials; prints the digest
	@scripts/image.sh

.PHONY: image-hf
image-hf: module-hf # The same of the module with Hugging Face's engine.
	@scripts/image.sh hf

.PHONY: module-hooks
module-hooks: # The module that tests can crash, and whose ring log they can read.
	@scripts/build-module.sh hooks

##@ Check

.PHONY: check
check: ## Format, lints, docs, licences, sources, invariants, the module
	@"$(PYTHON)" scripts/run_parts.py check

.PHONY: test
test: ## All tests: native, WebAssembly, against Dynamo's crates, the modules, the smoke and fleet runs
	@"$(PYTHON)" scripts/run_parts.py test

.PHONY: test-fleet
test-fleet: module ## Discovery, captures, and engines that come, go, die and trade places
	@cargo test --locked -p warmpath-sidecar
	@cargo test --locked -p warmpath-tests --test fuzz_replay
	@scripts/stack.sh fleet

.PHONY: test-bookings
test-bookings: module module-hooks ## Bookings under races, faults (BOOKINGS_STREAMS of them), crashes; across gateways
	@scripts/test-bookings.sh
	@scripts/stack.sh replicas

.PHONY: test-dynamo
test-dynamo: module ## Envoy with Warmpath in front of real Dynamo 1.6.1 workers and frontends
	@scripts/test-dynamo.sh

.PHONY: test-mesh
test-mesh: module module-hooks ## Manifests, chart, Kubernetes pages; spoofing, the feed's security, the endpoint picker
	@scripts/test-mesh.sh

.PHONY: test-parity
test-parity: ## Costs, choices and bookings against those of Dynamo's crates, over random states
	@cargo test --release --locked --manifest-path tests/parity/Cargo.toml \
		--target-dir target/parity

.PHONY: test-real-tokenizers
test-real-tokenizers: ## Tokens of five real tokenizers against Hugging Face's
	@scripts/fetch-tokenizer.sh all
	@WARMPATH_REAL_TOKENIZERS="$(CURDIR)/.cache/tokenizers" \
		cargo test --release --locked -p warmpath-tests --test real_tokenizers -- --nocapture

.PHONY: fuzz
fuzz: ## Fuzz every decoder for FUZZ_SECONDS (20) each: last line "N passed, N failed"
	@scripts/fuzz.sh

.PHONY: bench
bench: module ## Speed beside a baseline: all of it, a table; BENCH_ARGS="--record" keeps it (20 minutes after builds)
	@"$(PYTHON)" scripts/bench.py run $(BENCH_ARGS)

.PHONY: bench-quick
bench-quick: module ## The short form (3 minutes after builds)
	@"$(PYTHON)" scripts/bench.py run --quick $(BENCH_ARGS)

.PHONY: bench-ingest
bench-ingest: ## Block events a second from an engine's bytes to the feed, and the memory it takes
	@cargo bench --locked -p warmpath-sidecar --bench ingest
	@"$(PYTHON)" scripts/bench.py merge

.PHONY: bench-quality
bench-quality: module ## Routing quality against other routers: hits, time to first token, load (15 minutes)
	@scripts/bench-quality.sh

##@ Else

.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z][a-z0-9-]*:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
