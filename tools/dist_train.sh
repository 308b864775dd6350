#!/usr/bin/env bash
# Trains a recipe by torchrun, a process for each device: bash tools/dist_train.sh DEVICES RECIPE [KEY=VALUE ...]
#
#   bash tools/dist_train.sh 8 in1k/uniformer_small data.root=/data/imagenet
#
# On several machines, the same command on each of them, with environment variables:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=host0 bash tools/dist_train.sh 8 in1k/uniformer_small data.root=/data/imagenet
#   MASTER_PORT=29500  a free port of the first machine
#   PYTHON=python      the Python to run
# SIGTERM and SIGUSR1 reach all processes: the run saves and ends, and the same command goes on from there.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "dist_train: expected DEVICES RECIPE [KEY=VALUE ...], such as 8 in1k/uniformer_small, got: $*" >&2
    exit 2
fi
devices=$1
shift
nodes=${NNODES:-1}
if [[ $nodes == 1 ]]; then
    meeting=(--standalone)
else
    meeting=(--nnodes "$nodes" --node-rank "${NODE_RANK:?the number of this machine, from 0 on}"
        --master-addr "${MASTER_ADDR:?the name of the first machine}" --master-port "${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$devices" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" "$@" "trainer.devices=$devices" "trainer.nodes=$nodes"
