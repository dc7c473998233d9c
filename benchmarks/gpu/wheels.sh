#!/usr/bin/env bash
# Download what a GPU image may lack, without dependencies, into the folder that all.sh installs from:
#
#     benchmarks/gpu/wheels.sh [NAME[==VERSION]...]     # default: peft and accelerate
#
# PYTHON_VERSION (default 3.12) is the image's; PYTHON is the one whose pip downloads.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
limit_mb=60

[ $# -gt 0 ] || set -- peft accelerate
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do
  platforms+=(--platform "manylinux_${glibc}_x86_64")
done
rm -rf "$here/wheels"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
  --dest "$here/wheels" "$@"

# The whole of what travels: the tree that git knows, and the wheels.
tree=$(cd "$root" && git ls-files -z --cached --others --exclude-standard | du -cb --files0-from=- | tail -1 | cut -f1)
wheels=$(du -sb "$here/wheels" | cut -f1)
total_mb=$(((tree + wheels + 999999) / 1000000))
ls -l "$here/wheels"
echo "tree and wheels: $total_mb MB of at most $limit_mb"
[ "$total_mb" -le "$limit_mb" ]
