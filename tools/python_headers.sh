#!/bin/sh
# python_headers.sh PYTHON FOLDER: Debian's python3 comes without Python.h. Where it is missing,
# unpacks the package that holds it into FOLDER, which any user may do, and prints shell lines that
# make the build use it. Prints nothing where the headers are there.
set -eu
include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ ! -f "$include/Python.h" ] || exit 0
case $include in
  /usr/include/python3.*) package=lib${include##*/}-dev ;;
  *) package= ;;
esac
mkdir -p "$2"
cd "$2"
if [ -n "$package" ] && command -v apt-get dpkg-deb > /dev/null; then
  apt-get download -qq "$package" > log 2>&1 ||
    { [ "$(id -u)" = 0 ] && apt-get update -qq && apt-get download -qq "$package" > log 2>&1; } ||
    cat log >&2
  for deb in *.deb; do
    [ ! -f "$deb" ] || dpkg-deb -x "$deb" .
  done
fi
if [ ! -f "$PWD$include/Python.h" ]; then
  echo "[make] Python.h: expected it in $include, got nothing." >&2
  echo "       Install the headers of $1 (on Debian: apt-get install python3-dev)." >&2
  exit 1
fi
cat << END
export CPATH="$PWD/usr/include\${CPATH:+:\$CPATH}"
export CMAKE_ARGS="\${CMAKE_ARGS:-} '-DPython_INCLUDE_DIR=$PWD$include'"
END
