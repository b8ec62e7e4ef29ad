#!/usr/bin/env bash
# install.sh SOURCE: megatron_ru and what it needs, into an image that brings its own torch, which stays as it is.
# The Dockerfile and megatron_ru.def run it; MEGATRON_RU_CUDA_ARCHES chooses what the ops are compiled for.
set -euo pipefail

source=${1:?the folder of the source}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" "$here/image_torch.py" fingerprint >"$work/before"
"$python" "$here/image_torch.py" constraints >"$work/constraints.txt"

# Ours beside the image's own constraints; pip reads several, with blanks between them.
image=${PIP_CONSTRAINT:-}
if [ -z "$image" ] && [ -r /etc/pip/constraint.txt ]; then image=/etc/pip/constraint.txt; fi
export PIP_CONSTRAINT="${image:+$image }$work/constraints.txt"
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

"$python" "$here/image_torch.py" requirements "$source/pyproject.toml" data mpi hf >"$work/requirements.txt"
"$python" -m pip install --requirement "$work/requirements.txt"

# These two ask for torch>=…, which the image's pre-release does not satisfy, so that pip must not look at what they
# ask for; it is installed above. Without constraints, since they would also hold for the tools that build ours.
unset PIP_CONSTRAINT
"$python" -m pip install --no-deps "$("$python" "$here/image_torch.py" core "$source/pyproject.toml")"
MEGATRON_RU_BUILD=none "$python" -m pip install --no-deps "$source"

# Against the image's torch and with its nvcc; no GPU is needed for it. From elsewhere, so that it is the installed one.
cd /
"$python" -m megatron_ru build --kind cuda

"$python" "$here/image_torch.py" check "$work/before"
"$python" -m megatron_ru doctor
