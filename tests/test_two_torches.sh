#!/usr/bin/env bash
# One built library under two torch releases: makes a virtual environment for each version, puts the package with the SAME
# libfastpeft_ops.so on its path, runs the op tests there.
#
#   tests/test_two_torches.sh 2.14.1 [2.11.0 ...]        run by hand; fetches torch (CPU builds where the index has them)
#
# PYTHON        interpreter for the environments (default: python3)
# TORCH_INDEX   pip index to take torch from (default: pip's own configuration)
# VENVS         folder for the environments, kept between runs (default: build/two-torches)
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }

library=python/fastpeft/libfastpeft_ops.so
[ -f "$library" ] || { echo "$library is missing: build it with: pip install --no-build-isolation -e ." >&2; exit 2; }
before=$(sha256sum "$library")
venvs=${VENVS:-build/two-torches}
failed=()

for version in "$@"; do
  venv=$venvs/torch-$version
  if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
  fi
  "$venv/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version"
  "$venv/bin/pip" install --quiet numpy safetensors pytest pyyaml
  echo "== torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)'), $("$venv/bin/python" --version)"
  # no _C is asked for: it belongs to one Python version, the library to none
  if PYTHONPATH=python OMP_NUM_THREADS=2 "$venv/bin/python" -m pytest -q -rs -p no:cacheprovider \
      tests/test_qlinear.py tests/test_bottleneck.py tests/test_symbols.py \
      && PYTHONPATH=python "$venv/bin/python" tests/sanitize_small.py --device cpu; then
    echo "== torch $version: passed"
  else
    failed+=("$version")
  fi
done

[ "$(sha256sum "$library")" = "$before" ] || { echo "the library changed during the run" >&2; exit 1; }
[ ${#failed[@]} -eq 0 ] || { echo "failed under torch ${failed[*]}" >&2; exit 1; }
echo "one library, ${#} torch versions: $*"
