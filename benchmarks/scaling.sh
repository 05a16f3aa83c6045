#!/bin/sh
# What `zinf plan` says of a trillion parameters on one DGX-2 and of 32 trillion on 32; docs/scaling.md quotes it.
#   sh benchmarks/scaling.sh > benchmarks/results/scaling.txt
zinf=${ZINF:-.venv/bin/zinf}
one="--cluster configs/clusters/dgx2.yaml --vocab 0 --seq 1024 --recompute --offload-activations cpu"
many="--cluster configs/clusters/dgx2x32.yaml --vocab 0 --seq 1024 --recompute --offload-activations cpu"
big="--layers 99 --hidden 163840 --heads 1024 --batch 1 --max-tile-bytes 4GiB"
run() {
  echo "\$ zinf plan $*"
  # shellcheck disable=SC2086
  $zinf plan $* || exit 1
  echo
}
run --layers 30 --hidden 25600 --heads 256 --batch 4 --units linear $one
run --layers 128 --hidden 25600 --heads 256 --batch 4 --units linear $one
run --layers 128 --hidden 25600 --heads 256 --batch 4 --units linear --update backward $one
run --layers 128 --hidden 25600 --heads 256 --batch 4 --units linear $one --nodes 6
run $big $many --update backward
run $big $many --update backward --offload-params nvme --offload-optimizer nvme --device-bytes 12.4GiB
