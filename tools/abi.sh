#!/usr/bin/env bash
# Installs one wheel beside several torch versions, each in a fresh environment, and runs the core
# tests on the installed package there. Slow: it downloads each torch, gigabytes for a CUDA build.
#   tools/abi.sh WHEEL FOLDER TORCH_VERSION...
set -euo pipefail
wheel=$(realpath "$1")
mkdir -p "$2"
folder=$(realpath "$2")
repository=$(realpath "$(dirname "$0")/..")
shift 2

for version in "$@"; do
    environment=$folder/torch-$version
    python=$environment/bin/python
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$environment"
    "$python" -m pip install --quiet "torch==$version" numpy pytest pytest-timeout
    "$python" -m pip install --quiet --force-reinstall --no-deps "$wheel"

    # The tests are copied away from the repository, so that only the wheel can be imported.
    tests=$folder/tests-$version
    rm -rf "$tests"
    cp -r "$repository/tests" "$tests"
    cd "$tests"
    "$python" -m sep_attn
    "$python" - <<'END'
import sep_attn, torch
assert "site-packages" in sep_attn.__file__, sep_attn.__file__
assert sep_attn.native.unavailable_reason() is None, sep_attn.native.unavailable_reason()
END
    "$python" -m pytest -q -c /dev/null --rootdir . --timeout 600 \
        test_reference.py test_validation.py test_backends.py test_native_build.py test_layer.py \
        test_ops.py test_export.py test_module.py test_multihead.py test_packed_weights.py \
        -k "not triton and not no_compiler and not number_of_jobs and not left_out and not old_setuptools and not inductor"
    cd "$repository"
    [ -n "${KEEP:-}" ] || rm -rf "$environment" "$tests"
done
