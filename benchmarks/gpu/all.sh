#!/usr/bin/env bash
# Everything to measure on a GPU, in at most eight minutes on one H100, the most valuable first:
#
#     benchmarks/gpu/all.sh [--out DIR] [--wheels DIR] [--python PYTHON] [--parts "PART..."] [--limit PART=SECONDS]...
#     benchmarks/gpu/all.sh --rehearse      # all of it small, on a CPU
#
# Parts: kernels steps linear decode. Each runs in a process of its own under its own limit; one that fails or is cut
# doesn't stop the next, and the exit code is 1 if any did. DIR (default: $OUT, else results/CARD beside this script)
# gets results.jsonl, written row by row, log.txt and summary.md. Nothing is fetched from a network.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# Seconds; with wheels, summary and the five seconds that a cut part may take to end, below 480.
declare -A limit=([wheels]=25 [kernels]=90 [steps]=185 [linear]=65 [decode]=65 [summary]=20)
parts="kernels steps linear decode" python=python3 wheels=$here/wheels out=${OUT:-} rehearse=()

while [ $# -gt 0 ]; do
  case $1 in
    --rehearse)
      rehearse=(--rehearse)
      for part in $parts; do limit[$part]=240; done # it may have to share its processor
      shift && continue
      ;;
    -h | --help) usage && exit 0 ;;
    --out | --wheels | --python | --parts | --limit) ;;
    *) usage >&2 && exit 2 ;;
  esac
  [ $# -ge 2 ] || { echo "$1 needs a value" >&2 && exit 2; }
  case $1 in
    --out) out=$2 ;;
    --wheels) wheels=$2 ;;
    --python) python=$2 ;;
    --parts) parts=$2 ;;
    --limit) limit[${2%%=*}]=${2#*=} ;;
  esac
  shift 2
done
for part in $parts; do
  [ -f "$here/$part.py" ] && [ -n "${limit[$part]:-}" ] || { echo "no part $part" >&2 && exit 2; }
done

if [ -z "$out" ]; then
  # A rehearsal never writes over what a card has given.
  [ -n "${rehearse:-}" ] || card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -cs 'A-Za-z0-9\n' '-') || true
  out=$here/results/${card:-rehearsal}
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out/results.jsonl" "$out/log.txt" "$out/summary.md"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
ZIGGURAT_COMMIT=$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
export ZIGGURAT_COMMIT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export PYTHONPATH=$root:$root/src:$scratch/site${PYTHONPATH:+:$PYTHONPATH}
if [ ${#rehearse[@]} -gt 0 ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
fi
cd "$root"

failed=0

# part NAME COMMAND...: run it under NAME's limit, keep what it prints, and note how it ended.
part() {
  local name=$1 begin=$SECONDS code=0
  shift
  timeout --kill-after=5 "${limit[$name]}" "$@" >>"$out/log.txt" 2>&1 || code=$?
  [ "$code" -eq 0 ] || failed=1
  echo "$name: exit code $code after $((SECONDS - begin)) s"
  printf '{"part": "%s", "what": "end", "exit": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - begin)) \
    >>"$out/results.jsonl"
}

if compgen -G "$wheels/*.whl" >/dev/null; then
  mapfile -t needed < <("$python" -m benchmarks.gpu.wheels "$wheels" | grep .)
  if [ ${#needed[@]} -gt 0 ]; then
    part wheels "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "${needed[@]}"
  fi
fi
for name in $parts; do
  # Measurements stop some seconds before the limit, so that a part ends by itself.
  until=$(("$(date +%s)" + ${limit[$name]%.*} - 6))
  part "$name" "$python" -m "benchmarks.gpu.$name" --out "$out" --until "$until" "${rehearse[@]}"
done
timeout --kill-after=5 "${limit[summary]}" "$python" -m benchmarks.gpu.summary --out "$out" || failed=1
exit "$failed"
