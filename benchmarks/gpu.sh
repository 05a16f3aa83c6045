#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: build the extension, run the tests marked `gpu`, time steps beside the
# plain Trainer, FSDP2's offload and, where they are installed, torchao's and DeepSpeed's, and train the largest model
# that fits.
#
#   bash benchmarks/gpu.sh | tee benchmarks/results/gpu.txt
#   bash benchmarks/gpu.sh build tests        # parts: build, tests, steps, largest
#   SECONDS_STEPS=500 bash benchmarks/gpu.sh build steps
#
# Uses the Python on the path (or PYTHON=...), which must have torch with CUDA. No network is needed: what else is missing
# is installed from WHEELS (default .whl), a folder that benchmarks/gpu_wheels.sh fills on a machine with one. Not run on a
# GPU yet: none was at hand. Each part has a limit of its own, prints as it goes, and if it fails the others run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PYTHONWARNINGS="ignore,always:updates of optimizer state" # that they are slow, if they are
export ZINF_NVME_PATH=${ZINF_NVME_PATH:-$PWD}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.mem_get_info())' || exit 1
git log -1 --format='commit %h' 2> /dev/null
nvidia-smi --query-gpu=driver_version,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader 2> /dev/null
echo "$(nproc) cores"
free -g | sed -n 2p
df -h "$ZINF_NVME_PATH" | tail -1

failed=0
part() { # part SECONDS COMMAND...
  printf '\n$ %s\n' "${*:2}"
  local begin=$SECONDS
  timeout -s INT -k 10 "$@" || { failed=1; echo "failed or out of time (status $?)"; }
  echo "($((SECONDS - begin)) s)"
}

build() { # what was carried, else what can be compiled here; else the functions in torch, which warn
  if compgen -G "$wheels/*.whl" > /dev/null; then
    part 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
  if compgen -G "$site/lightning_zinf/_ext*.so" > /dev/null; then
    cp "$site"/lightning_zinf/_ext*.so lightning_zinf/ # the Python files are this checkout's; git ignores the extension
  else
    part 120 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
  fi
  "$python" -c 'from lightning_zinf.ops import kernels; print("kernels:", kernels.isa(), kernels.num_threads(), "threads")' || failed=1
}

tests() { # by name: other test files need packages that are not asked for here
  local files
  mapfile -t files < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
  part "${SECONDS_TESTS:-150}" "$python" -m pytest -v --tb=short --maxfail=10 -p no:cacheprovider -m gpu "${files[@]}"
}

steps() {
  part $((${SECONDS_STEPS:-220} + 10)) "$python" benchmarks/gpu.py steps --seconds "${SECONDS_STEPS:-220}" --nvme-path "$ZINF_NVME_PATH"
}

largest() {
  part $((${SECONDS_LARGEST:-100} + 10)) "$python" benchmarks/gpu.py largest --seconds "${SECONDS_LARGEST:-100}" --nvme-path "$ZINF_NVME_PATH"
}

for name in "${@:-build tests steps largest}"; do
  for one in $name; do
    case $one in
      build | tests | steps | largest) "$one" ;;
      *) echo "unknown part: $one (there are build, tests, steps and largest)"; exit 2 ;;
    esac
  done
done
exit "$failed"
