#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: build the extension, run the tests marked `gpu`, time the tiers beside
# the plain Trainer, FSDP2's offload and, where they are installed, DeepSpeed's and torchao's.
#
#   bash benchmarks/gpu.sh | tee benchmarks/results/gpu.txt
#
# Uses the Python on the path, which must have torch with CUDA and what pyproject.toml lists. Not run on a GPU yet: none
# was at hand. Each part has a limit of its own, and one that fails does not keep the others from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
git log -1 --format='commit %h' 2> /dev/null
nproc; free -g | sed -n 2p

failed=0
part() { # part SECONDS COMMAND...
  printf '\n$ %s\n' "${*:2}"
  timeout "$@" || { failed=1; echo "failed or out of time (status $?)"; }
}

export PYTHONWARNINGS=ignore
part 120 python3 -m pip install --quiet --no-build-isolation --no-deps -e .
part 180 python3 -m pytest -q -m gpu tests

cases=(plain "zinf ram" "zinf cpu offload" "zinf all on nvme" "fsdp2 cpu offload")
others=()
if python3 -c 'import deepspeed' 2> /dev/null; then
  cases+=("deepspeed cpu offload" "deepspeed nvme tuned")
  others=(--deepspeed python3)
fi
if python3 -c 'import torchao' 2> /dev/null; then
  cases+=("torchao cpu offload")
fi
# 0.4 billion parameters, which the plain Trainer holds easily, then 1.2 billion.
gpu=(--device cuda --precision bf16-mixed --rounds 1 --warmup 2 --vocab 32768 --seq 1024)
part 120 python3 benchmarks/step.py "${gpu[@]}" --layers 24 --hidden 1024 --batch 8 --steps 6 "${others[@]}" --cases "${cases[@]}"
part 150 python3 benchmarks/step.py "${gpu[@]}" --layers 24 --hidden 2048 --batch 8 --steps 4 "${others[@]}" --cases "${cases[@]}"
exit "$failed"
