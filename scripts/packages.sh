#!/usr/bin/env bash
# Installs the Debian packages that are missing, and nothing when none is.
#
#   scripts/packages.sh run    what podtree itself needs
#   scripts/packages.sh demo   and what `make demo` shows
#   scripts/packages.sh bench  podtree, and the programs that `make bench` records
#   scripts/packages.sh test   and the real programs of the test suite
#
# A package counts as present when the program it is wanted for is there, however it came:
# Node.js or PostgreSQL from another source will do. Services are not started by their packages.
set -euo pipefail

export DEBIAN_FRONTEND=noninteractive
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
what="${1:-run}"

program() { # program NAME PACKAGE: wants PACKAGE unless NAME can be run
    command -v "$1" >/dev/null 2>&1 || missing+=("$2")
}

library() { # library SONAME PACKAGE: wants PACKAGE unless the dynamic linker knows SONAME
    ldconfig -p | grep -q "$1" || missing+=("$2")
}

path() { # path GLOB PACKAGE: wants PACKAGE unless something matches GLOB
    compgen -G "$1" >/dev/null || missing+=("$2")
}

missing=()
program mkfs.btrfs btrfs-progs
program btrfs btrfs-progs
program losetup mount
program unshare util-linux
library libseccomp.so.2 libseccomp2
if [ "$what" != run ]; then
    program redis-server redis-server
    program redis-cli redis-tools
fi
if [ "$what" = bench ]; then
    program redis-benchmark redis-tools
fi
if [ "$what" = test ] || [ "$what" = bench ]; then
    program gcc gcc
    path '/usr/include/x86_64-linux-gnu/sys/mman.h' libc6-dev
fi
if [ "$what" = test ]; then
    path '/usr/lib/postgresql/*/bin/pg_amcheck' postgresql
    program nginx nginx
    program chromium chromium
    program wrk wrk
    program memcached memcached
    program mariadbd mariadb-server
    program mariadb mariadb-client
    program node nodejs
    program go golang-go
    program javac default-jdk-headless
    program make make
    program objdump binutils
    program sqlite3 sqlite3
    program ps procps
    library libjemalloc.so.2 libjemalloc2
    path '/usr/bin/python3' python3
fi
[ "${#missing[@]}" -eq 0 ] && exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if ! command -v apt-get >/dev/null; then
    echo "missing, and there is no apt-get to install them: ${missing[*]}" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "missing, and only root can install them: apt-get install ${missing[*]}" >&2
    exit 1
fi

# invoke-rc.d asks policy-rc.d before a package starts its service: 101 means "not now".
# One that is there already is left as it is.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
fi

install() { apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}"; }

echo "installing: ${missing[*]}"
log="$(mktemp)"
if ! install >"$log" 2>&1; then # an old package list, most often
    { apt-get update -qq && install; } >"$log" 2>&1 || {
        cat "$log" >&2
        echo "apt-get could not install: ${missing[*]}" >&2
        exit 1
    }
fi
rm -f "$log"
