#!/usr/bin/env bash
# Regenerates the stubs beside the .proto files, or with --check says whether they are up to date. Needs grpcio-tools of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -Ipilotfish/proto=proto --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    pilotfish/proto/{common,gateway,inference,journal,worker}.proto
rm -f "$out"/pilotfish/proto/{common,journal}_pb2_grpc.py  # no service in them
if [ "${1:-}" = --check ]; then
    for file in "$out"/pilotfish/proto/*; do
        diff -u "proto/$(basename "$file")" "$file" || { echo "proto/ is out of date: run proto/generate.sh" >&2; exit 1; }
    done
else
    mv "$out"/pilotfish/proto/* proto/
fi
