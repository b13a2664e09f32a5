#!/usr/bin/env bash
# Measures this machine; `make bench` runs it. Arguments for one script alone: call that script, see README.md.
#   SKIP_CODEC=1   leave out the codec (its peer needs an environment of its own, which takes some minutes to build)
#   SKIP_VLLM=1    leave out vLLM
#   SKIP_PARALLEL=1 leave out parallel decoding (half an hour)
#   SKIP_FILMS=1   leave out films (ten minutes)
#   SKIP_MEGATRON=1 leave out the Megatron trainer
#   PEER=folder    where the codec's peer is or shall be installed
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
PEER=${PEER:-runs/peers/magvit2-pytorch}
HERE=recipes/benchmarks

if [ -n "${SKIP_CODEC:-}" ]; then
  echo "skipped by SKIP_CODEC: the codec against magvit2-pytorch"
else
  python $HERE/codec_versus_magvit2_pytorch.py --peer-environment "$PEER" --make-environment || {
    echo "The codec's peer could not be installed in $PEER; SKIP_CODEC=1 leaves this benchmark out." >&2
    exit 1
  }
  python $HERE/codec_versus_magvit2_pytorch.py --peer-environment "$PEER"
fi

if [ -n "${SKIP_VLLM:-}" ]; then
  echo "skipped by SKIP_VLLM: vLLM against transformers"
else
  python $HERE/vllm_versus_transformers.py
fi

if [ -n "${SKIP_PARALLEL:-}" ]; then
  echo "skipped by SKIP_PARALLEL: parallel against autoregressive decoding"
else
  python $HERE/parallel_versus_autoregressive.py
fi

if [ -n "${SKIP_FILMS:-}" ]; then
  echo "skipped by SKIP_FILMS: films against full attention"
else
  python $HERE/films_versus_full_attention.py
fi

if [ -n "${SKIP_MEGATRON:-}" ]; then
  echo "skipped by SKIP_MEGATRON: the Megatron trainer against transformers"
else
  python $HERE/megatron_versus_transformers.py
fi
