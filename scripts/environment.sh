# Sourced by the other scripts: makes .venv from requirements.lock when it is missing or stale.
#   ensure_environment EXTRAS     e.g. "dev,libero", or "" for the core
#   ensure_gl                     software OpenGL, which LIBERO renders with
# Needs git, python3 (3.11 or newer) and pip. Never needs root, except that ensure_gl installs
# system packages itself when it is run by root.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

ensure_environment() {
  local extras="$1" base="${PYTHON3:-python3}" stamp="$ROOT/.venv/jaxvla-environment"
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$base" --version) is too old, jaxvla needs Python 3.11 or newer" >&2
    echo "       set PYTHON3=/path/to/python3.11" >&2
    return 2
  fi
  # An environment made for more extras serves fewer as well.
  local wanted installed=""
  wanted="$(cat "$ROOT/requirements.lock" "$ROOT/pyproject.toml" | sha256sum | cut -c1-16)"
  [ -f "$stamp" ] && installed="$(cat "$stamp")"
  case "$installed" in
    "$wanted $extras" | "$wanted "*",$extras" | "$wanted $extras,"*) return 0 ;;
    "$wanted "*) [ -z "$extras" ] && return 0 ;;
  esac
  echo "installing jaxvla${extras:+[$extras]} into .venv (1.3 GB; about 3 GB with libero) ..."
  local start=$SECONDS
  [ -x "$PYTHON" ] || "$base" -m venv "$ROOT/.venv"
  rm -f "$stamp"
  # --no-compile: Python compiles what is imported when it is imported, a fraction of it all.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint "$ROOT/requirements.lock" --editable "$ROOT${extras:+[$extras]}"
  case ",$extras," in
    # What tests talk to --job=serve with. --no-deps: its metadata wants numpy<2, and its code runs
    # with any. All else that its client imports is there already.
    *,openpi,*) "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile \
      --no-deps openpi-client==0.1.2 ;;
  esac
  echo "$wanted $extras" > "$stamp"
  echo "installation took $((SECONDS - start))s"
}

ensure_gl() {
  if "$PYTHON" -c 'import ctypes; ctypes.CDLL("libOSMesa.so.8")' 2>/dev/null; then return 0; fi
  local install="apt-get install -y libosmesa6 libegl1 libgl1"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing software OpenGL: $install"
    apt-get update -qq && $install -qq >/dev/null
  else
    echo "LIBERO tests will be skipped: no software OpenGL. Install it with: sudo $install" >&2
  fi
}
