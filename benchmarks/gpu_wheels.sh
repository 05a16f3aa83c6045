#!/usr/bin/env bash
# Fill a folder with what benchmarks/gpu.sh wants on a machine without a network: a wheel of this checkout, built for
# CPython 3.12 and later, and packages that its Python lacks. Run it where there is a network, and a CPython >= 3.12 with
# headers and a compiler for the wheel.
#
#   bash benchmarks/gpu_wheels.sh [FOLDER [PACKAGE...]]
#
# FOLDER is .whl by default. PACKAGE are wheels to add to those that are always taken (torchao, to compare with). Nothing
# of torch, CUDA or Lightning is taken along: these the other machine must have. Their dependencies are not followed
# either; name what is missing there. PYTHON_VERSION (3.12) is that of the other machine, BUILDER (python3.12) what builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.whl}
shift || true
version=${PYTHON_VERSION:-3.12}
builder=${BUILDER:-python3.12}

mkdir -p "$folder"
rm -f "$folder"/lightning_zinf-*.whl
"$builder" -m pip wheel --quiet --no-deps --wheel-dir "$folder" .
platforms=()
for glibc in 28 27 24 17; do
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for package in torchao "$@"; do
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$folder" "$package"
done
ls -l "$folder"
du -sh "$folder"
