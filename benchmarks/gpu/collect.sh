#!/usr/bin/env bash
# Collect into .gpu/wheels what a machine with Python 3.12, JAX 0.11, Flax 0.12.10 and Optax lacks for benchmarks/gpu.sh:
# the project's wheel of the last commit, and its dependencies as constraints.txt pins them. Git ignores the folder.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd); wheels=$root/.gpu/wheels; python=${PYTHON:-python3}
rm -rf "$wheels"; mkdir -p "$wheels"
platforms=()
for tag in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for package in orbax-checkpoint grain array_record pydantic pydantic_core annotated-types typing-inspection typer rich \
    cloudpickle more-itertools protobuf tensorboardX; do
    pin=$(grep -iE "^${package//[-_]/[-_]}==" "$root/constraints.txt" | grep -v "< *\"3.12\"" | head -1 | cut -d';' -f1)
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d "$wheels" "${pin:-$package}" || echo "missing: ${pin:-$package}"
done
# Grain's; it is published as sources alone.
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$wheels" portpicker
copy=$(mktemp -d); trap 'rm -rf "$copy"' EXIT
git clone -q "$root" "$copy/project"
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$wheels" "$copy/project"
ls "$wheels"; du -sh "$wheels"
