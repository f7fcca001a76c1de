#!/usr/bin/env bash
# Builds the sdist, and from it the wheel, into dist/. Tries the wheel in a fresh environment that has torch and
# nothing else, then once more a wheel without the extension. `make wheel` has made .venv, which builds; `make
# wheel-cuda` sets RNNKIT_CUDA=1, so that the first wheel has the CUDA kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."

tried=$(mktemp -d)
trap 'rm -rf "$tried"' EXIT
smoke=$PWD/tests/ci/smoke.py
pip="$tried/env/bin/python -m pip --disable-pip-version-check -q"

rm -rf dist
.venv/bin/python -m build --no-isolation --outdir dist . >"$tried/build.log" 2>&1 || {
  cat "$tried/build.log"
  exit 1
}
ls -l dist
case ${RNNKIT_CUDA:-0}$(echo dist/*.whl) in
  1*-cp310-abi3-*) has=cuda ;;
  *-cp310-abi3-*) has=with ;;
  *) has=without ;;
esac

"$PYTHON" -m venv "$tried/env"
$pip install "$TORCH" numpy
$pip install --no-deps dist/*.whl
(cd "$tried" && env/bin/python "$smoke" "$has")

RNNKIT_CUDA=0 RNNKIT_EXTENSION=0 .venv/bin/python -m pip --disable-pip-version-check -q \
  wheel --no-build-isolation --no-deps -w "$tried" dist/*.tar.gz
$pip install --no-deps --force-reinstall "$tried"/rnnkit-*-py3-none-any.whl
(cd "$tried" && env/bin/python "$smoke" without)
