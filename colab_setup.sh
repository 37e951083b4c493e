#!/usr/bin/env bash
# Prepares Colab, Kaggle or any Linux machine whose Python already has things in it.
#
#   bash colab_setup.sh [PYTHON]      PYTHON: whose packages to set up; the default is python3
#
# Moves only what must move, leaves torch and numpy alone, installs llamanb from the checkout this file lies in. A second
# run finds nothing to do. The work is in llamanb/setup/environment.py; the reasons are in docs/decisions/0002-colab.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-python3}

fail() { # what, why, fix
    printf 'error: %s\n  why: %s\n  fix: %s\n' "$1" "$2" "$3" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "no Python at '$python'" "it is not a program in PATH" \
    "install Python 3.11 or newer (apt install python3 python3-venv), or name one: bash $0 /path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail \
    "$("$python" --version 2>&1) is too old" "llamanb needs Python 3.11 or newer" \
    "name a newer one: bash $0 python3.12"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip" \
    "$("$python" -m pip --version 2>&1 | tail -n 1)" "$python -m ensurepip --upgrade, or apt install python3-pip"

# Debian, Ubuntu and others keep pip out of the system's Python (PEP 668), unless the machine's owner has allowed it.
if "$python" - <<'EOF' && ! "$python" -m pip config list | grep -qiE "break-system-packages='?(1|true|yes|on)"; then
import pathlib, sys, sysconfig
managed = pathlib.Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
sys.exit(not (managed and sys.prefix == sys.base_prefix))
EOF
    fail "$python belongs to the operating system" "its packages are managed by apt or the like, so pip may not add to it" \
        "make -C $here install   (makes $here/.venv), or without make, a virtual environment of your own:
       $python -m venv ~/llamanb-venv && bash $here/colab_setup.sh ~/llamanb-venv/bin/python"
fi

PYTHONPATH="$here" PYTHONDONTWRITEBYTECODE=1 exec "$python" -m llamanb.setup.environment
