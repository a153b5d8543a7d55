#!/usr/bin/env bash
# One built library under several torch releases: runs the op tests with the torch that PYTHON has, then in a virtual
# environment for each version given, always with the SAME libfastpeft_ops.so on the path.
#
#   tests/test_two_torches.sh 2.14.1 [2.11.0 ...]        run by hand; installs torch
#
# PYTHON        interpreter (default: .venv/bin/python, else python3)
# TORCH_INDEX   pip index to take torch from (default: pip's own configuration)
# VENVS         folder for the environments, kept between runs (default: build/two-torches)
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }

library=python/fastpeft/libfastpeft_ops.so
[ -f "$library" ] || { echo "$library is missing: build it with: pip install --no-build-isolation -e ." >&2; exit 2; }
before=$(sha256sum "$library")
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
venvs=${VENVS:-build/two-torches}
passed=() failed=()

run_under() {  # $1: an interpreter with torch and pytest
  local version
  version=$("$1" -c 'import torch; print(torch.__version__)')
  echo "== torch $version, $("$1" --version)"
  # no _C is asked for: it belongs to one Python version, the library to none
  if PYTHONPATH=python OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE "$1" -m pytest -q -rs -p no:cacheprovider \
      tests/test_qlinear.py tests/test_bottleneck.py tests/test_symbols.py \
      && PYTHONPATH=python "$1" tests/sanitize_small.py --device cpu; then
    passed+=("$version")
  else
    failed+=("$version")
  fi
}

if "$python" -c 'import torch, pytest' 2>/dev/null; then
  run_under "$python"
else
  echo "== $python has no torch and pytest: only the versions given are run"
fi
for version in "$@"; do
  venv=$venvs/torch-$version
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version"
  "$venv/bin/pip" install --quiet numpy safetensors pytest pyyaml
  run_under "$venv/bin/python"
done

[ "$(sha256sum "$library")" = "$before" ] || { echo "the library changed during the run" >&2; exit 1; }
echo "one library: passed under torch ${passed[*]:-none}; failed under ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
