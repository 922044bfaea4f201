#!/usr/bin/env bash
# The paper's pairs, CIFAR-100 and ResNet-20, for as long as a machine is there.
#
#   cifar100.sh DATA_DIR OUT MINUTES [FLAGS]
#
# RigL at 97 %, then at 95 %, 100 epochs, three seeds, with and without SparseOpt
# side by side. With --precision bfloat16, one H200 takes about ten minutes for
# each sparsity (extrapolated from 64 epochs). After MINUTES all runs save where
# they are, and what is finished is reported; the same command goes on from there,
# on another machine too once OUT has been copied. Folders of several machines
# become one by copying. FLAGS are those of the study convergence, and win.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: $0 DATA_DIR OUT MINUTES [FLAGS]" >&2
  exit 2
fi
data=$1 out=$2 minutes=$3
shift 3
study=(python -m sparseopt_jax.studies convergence
  --recipe cifar100-resnet20 --data-dir "$data" --out "$out"
  --budgets 100 --seeds 3 --jobs 2 "$@")
end=$((SECONDS + 60 * minutes))

for condition in rigl-97 rigl-95; do
  left=$((end - SECONDS))
  if ((left <= 0)); then break; fi
  code=0
  timeout --signal=TERM "$left" "${study[@]}" --conditions $condition || code=$?
  case $code in
    0) ;;
    124) break ;; # Time is up.
    *) exit $code ;;
  esac
done
"${study[@]}" --conditions rigl-95 rigl-97 --report
