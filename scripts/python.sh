#!/bin/sh
# Makes a Python environment with the packages of scripts/requirements.txt, for plots and notebooks. Where python3 or its
# venv module is missing, Debian and Ubuntu get it by apt-get (with sudo if not root). Usage: python.sh DIRECTORY
set -u
directory=$1
here=$(dirname "$0")
if ! python3 -c 'import venv, ensurepip' >/dev/null 2>&1; then
  sudo=
  [ "$(id -u)" -eq 0 ] || sudo=sudo
  if ! command -v apt-get >/dev/null 2>&1 ||
     ! { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
         python3 python3-venv; } >/dev/null; then
    echo "error: plots and notebooks need python3 with its venv module; install them (Debian, Ubuntu: apt-get install python3-venv)" >&2
    exit 2
  fi
fi
if ! { python3 -m venv "$directory" && "$directory/bin/python" -m pip install -q --disable-pip-version-check \
       -r "$here/requirements.txt"; }; then
  echo "error: could not install the Python packages of scripts/requirements.txt into $directory; see the lines above" >&2
  exit 2
fi
