#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: build the extension, run the tests marked `gpu`, time the tiers.
#
#   bash benchmarks/gpu.sh | tee benchmarks/results/gpu.txt
#
# Uses the Python on the path, which must have torch with CUDA and what pyproject.toml lists. Not run yet: no GPU was at
# hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())'
git log -1 --format='commit %h' 2> /dev/null || true
python3 -m pip install --quiet --no-build-isolation --no-deps -e .
timeout 240 python3 -m pytest -q -m gpu tests
