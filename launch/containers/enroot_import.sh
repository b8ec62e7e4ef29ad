#!/usr/bin/env bash
# enroot_import.sh IMAGE FILE.sqsh: an image as the file that enroot and pyxis start from.
# IMAGE is one of this machine's Docker (megatron_ru) or of a registry (nvcr.io/nvidia/pytorch:25.06-py3).
set -euo pipefail

image=${1:?an image, as in megatron_ru or nvcr.io/nvidia/pytorch:25.06-py3}
file=${2:?the file to write, as in megatron_ru.sqsh}

fail() {
    echo "enroot_import: $1" >&2
    exit 2
}

command -v enroot >/dev/null || fail "there is no enroot on PATH: run this on a node of the cluster that has it"
# enroot refuses to overwrite, after it has fetched everything.
[ ! -e "$file" ] || fail "$file exists: remove it or name another file"

# A first part with a dot or a port is a registry, which enroot wants separated by #.
registry=${image%%/*}
case $registry in
    "$image") uri=dockerd://$image ;;
    *.* | *:*) uri=docker://$registry#${image#*/} ;;
    *) uri=dockerd://$image ;;
esac

# Finished or absent, never half: a job that starts meanwhile sees no broken file.
trap 'rm -f "$file.partial"' EXIT
enroot import --output "$file.partial" "$uri"
mv "$file.partial" "$file"
