#!/bin/sh
# Fills the ${NAME}s of a template from the environment:
#
#   GATEWAY_PORT=10000 ... sh fill.sh envoy.yaml > filled.yaml
#
# Refuses to leave one unfilled. Comment lines are dropped, as they name the
# variables. Values may not hold line breaks or the character |.
set -eu

template=$1
script=
for name in $(grep -v '^ *#' "$template" | grep -o '\${[A-Z0-9_]*}' | tr -d '${}' | sort -u); do
    eval "value=\${$name:-}"
    if [ -z "$value" ]; then
        echo "fill.sh: $name is not set" >&2
        exit 1
    fi
    script="${script}s|\\\${$name}|$value|g;"
done
grep -v '^ *#' "$template" | sed "$script"
