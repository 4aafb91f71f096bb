#!/bin/sh
# Installs the packages that the build needs and that are missing: Debian and Ubuntu by apt-get (with sudo if not root);
# elsewhere it says what to install. Usage: install.sh COMPILER
set -u
compiler=${1:-g++}

if ! command -v "$compiler" >/dev/null 2>&1; then
  echo "error: no C++ compiler '$compiler'; install one (Debian, Ubuntu: apt-get install g++), or make CXX=..." >&2
  exit 2
fi

# A header and the Debian package that brings it.
missing=
need() {
  if ! echo "#define PCRE2_CODE_UNIT_WIDTH 8
#include <$1>" | "$compiler" -std=c++17 -fopenmp -E -x c++ -I/usr/include/eigen3 -I/usr/local/include/eigen3 \
       -I/opt/homebrew/include/eigen3 - >/dev/null 2>&1; then
    missing="$missing $2"
  fi
}
need Eigen/Core libeigen3-dev
need CLI/CLI.hpp libcli11-dev
need nlohmann/json.hpp nlohmann-json3-dev
need doctest/doctest.h doctest-dev
need pcre2.h libpcre2-dev
need utf8proc.h libutf8proc-dev
need archive.h libarchive-dev
case $("$compiler" --version 2>/dev/null) in *clang*) need omp.h libomp-dev ;; *) need omp.h libgomp1 ;; esac
[ -z "$missing" ] && exit 0

if ! command -v apt-get >/dev/null 2>&1; then
  echo "error: missing (names of the Debian packages):$missing" >&2
  echo "install Eigen 3.4, CLI11, nlohmann-json, doctest, PCRE2, utf8proc, libarchive and OpenMP with your package manager, for example" >&2
  echo "  Fedora: dnf install eigen3-devel cli11-devel json-devel doctest-devel pcre2-devel utf8proc-devel libarchive-devel libomp-devel" >&2
  echo "  Arch:   pacman -S eigen cli11 nlohmann-json doctest pcre2 libutf8proc libarchive openmp" >&2
  exit 2
fi
sudo=
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "error: missing packages, and neither root nor sudo here; as root: apt-get install$missing" >&2
    exit 2
  fi
  sudo=sudo
fi
echo "Installing:$missing"
# shellcheck disable=SC2086
if ! { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/dev/null; then
  echo "error: could not install; try by hand: $sudo apt-get install$missing" >&2
  exit 2
fi
