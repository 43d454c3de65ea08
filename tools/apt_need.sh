#!/bin/sh
# apt_need.sh PACKAGE...: installs the Debian packages that are missing, or says which and fails.
set -eu
command -v dpkg-query > /dev/null || exit 0  # not Debian: CMake says what it does not find
missing=
for package; do
  case $(dpkg-query -W -f '${Status}' "$package" 2> /dev/null) in
    *" installed") ;;
    *) missing="$missing $package" ;;
  esac
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
  echo "[make] Debian packages: expected$missing, got none of these." >&2
  echo "       Run as root: apt-get install$missing" >&2
  exit 1
fi
echo "Installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing > /dev/null
