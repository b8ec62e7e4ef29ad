#!/usr/bin/env bash
# bootstrap.sh demo|dev: a .venv in this clone with the package installed editable and its ops compiled; nothing to do
# is done fast. PYTHON chooses the interpreter, CONSTRAINTS a file of pinned versions, MEGATRON_RU_BUILD the kind of ops
# (auto, cpu, cuda, none); pip's own variables (PIP_INDEX_URL) apply.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:?demo or dev}
venv=.venv
[ "$extras" = demo ] && wanted='demo,mpi,data' || wanted=$extras

fail() {
    echo "megatron-ru: $1" >&2
    exit 2
}

is_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# A name on PATH may be a version manager's shim that fails, so each candidate is run; pyenv's versions come
# by their folder, selected or not.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_python "$PYTHON" || fail "PYTHON=$PYTHON does not run as Python 3.12 or newer: correct or unset it"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 python3 python3.13; do
        if is_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.12 or newer was found (python3 is $(python3 -V 2>/dev/null || echo missing)): apt install python3.12 python3.12-venv, or set PYTHON=/path/to/python3.12"
}

# What the installation depends on.
fingerprint() {
    {
        cat pyproject.toml setup.py
        [ -z "${CONSTRAINTS:-}" ] || cat "$CONSTRAINTS"
    } | sha256sum | cut -d' ' -f1
}

# What the compiled ops depend on: a new installation may bring another torch.
ops_fingerprint() {
    {
        echo "$now ${MEGATRON_RU_BUILD:-auto} ${MEGATRON_RU_CUDA_ARCHES:-}"
        cat megatron_ru/ops/build.py
        find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0r cat
    } | sha256sum | cut -d' ' -f1
}

# Without compiled ops everything runs in plain torch, so a failure is told and does not end this.
compile_ops() {
    [ -d csrc ] || return 0
    local wanted_ops stamp=$venv/compiled-ops
    wanted_ops=$(ops_fingerprint)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted_ops" ]; then
        return 0
    fi
    rm -f "$stamp"
    if "$venv/bin/python" -m megatron_ru build; then
        echo "$wanted_ops" >"$stamp"
    else
        echo "megatron-ru: the ops were not compiled (the reason stands above): they run in plain torch" >&2
    fi
}

[ -z "${CONSTRAINTS:-}" ] || [ -f "$CONSTRAINTS" ] || fail "CONSTRAINTS=$CONSTRAINTS is not a file: correct or unset it"
now=$(fingerprint)
for stamp in "$venv/installed-dev" "$venv/installed-$extras"; do
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && [ -x "$venv/bin/python" ]; then
        compile_ops
        exit 0
    fi
done

command -v g++ >/dev/null || command -v c++ >/dev/null ||
    fail "no C++ compiler was found, which builds the dataset index: apt install g++"

if [ ! -e "$venv" ]; then
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python $version ($python) has no venv module: apt install python$version-venv"
    echo "megatron-ru: creating $venv with Python $version ($python)"
    # Interrupted half-way it would look finished, so it is removed again.
    trap 'rm -rf "$venv"' EXIT
    "$python" -m venv "$venv"
    trap - EXIT
fi
is_python "$venv/bin/python" || fail "$venv has no working Python 3.12 or newer: rm -rf $venv and run this again"

echo "megatron-ru: installing the package and its libraries into $venv (some minutes and 6 GB the first time)"
rm -f "$venv"/installed-*
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} --editable ".[$wanted]" ||
    fail "pip could not install the package (its reason stands above); once it is mended, run the same command again"
echo "$now" >"$venv/installed-$extras"
compile_ops
