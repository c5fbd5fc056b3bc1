#!/bin/sh
# What busigen does on this machine's NVIDIA card, in ten minutes at most: GPU tests, parity, throughput, as JSON.
#
#   benchmarks/gpu_check.sh                    writes benchmarks/results/gpu_check.json
#   benchmarks/gpu_check.sh --wheels wheels    installs what lies in that folder first, into a folder of its own: for
#                                              machines that reach no package index
#   benchmarks/gpu_check.sh --dry-run          the same on the processor, tiny: only the card is left untested
#
# All other options go to gpu_check.py (--help). BUSIGEN_PYTHON names the Python to use.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
root=$(dirname "$here")
python=${BUSIGEN_PYTHON:-python3}
wheels=
if [ "${1:-}" = --wheels ]; then
    wheels=${2:?"--wheels needs a folder"}
    shift 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$wheels" ]; then
    # --no-deps: a folder of wheels is what it is; what is missing shows in the report's list of versions.
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl
    PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
"$python" "$here/gpu_check.py" "$@"
