#!/usr/bin/env bash
# The newest versions that the extra `train` admits, in an environment of their own, and the tests that train in them.
#
#   tools/newest.sh [--work FOLDER] [--python PROGRAM] [--chroot] [--show FOLDER]... [-- ARGUMENTS OF PYTEST]
#
#   --work FOLDER     where everything is kept, some 20 GB (.cache/newest); what is complete there is not made again
#   --python PROGRAM  a Python >= 3.12, which Axolotl >= 0.20 needs (else: python3.13 or python3.12, if on the PATH)
#   --chroot          not this system's Python but Debian 13's, in a folder that debootstrap fills; done unasked where
#                     this system has none that is new enough; needs root
#   --show FOLDER     make a folder of this system visible in there, at the same path: a package index, certificates
#   -- ARGUMENTS      what pytest runs, e.g. `-- --last-failed` or `-- tests/e2e/test_axolotl.py -k resumes`; without
#                     them: the tests of Axolotl runs and the fast ones
#
# Without root: run the script as it is in any container with Python >= 3.12, g++ and git.
# Versions and every test's result go to report.txt in the folder.
set -euo pipefail
shopt -s inherit_errexit

SUITE=trixie
NEEDED=(ca-certificates g++ git python3 python3-dev python3-venv)
TESTS=(tests --ignore tests/serve --ignore tests/e2e/test_whole_line.py --ignore tests/conversion/test_lora_served.py)
# Axolotl 0.21 pins a zstandard that cannot be built for Python 3.13; any later one does.
OVERRIDES='zstandard>=0.23'

main() {
    local work="" python="" chroot=false shown=() tests=()
    while (($#)); do
        case $1 in
            --work) work=$(realpath -m "$2"); shift 2 ;;
            --python) python=$2; shift 2 ;;
            --chroot) chroot=true; shift ;;
            --show) shown+=("$(realpath "$2")"); shift 2 ;;
            --) shift; tests=("$@"); break ;;
            *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; [[ $1 == --help ]]; exit ;;
        esac
    done
    cd "$(dirname "$0")/.."
    work=${work:-$PWD/.cache/newest}
    mkdir -p "$work"
    $chroot || python=${python:-$(new_python)}
    if [[ -n $python ]]; then
        install_and_test "$python" "$work" "${tests[@]}"
    else
        make_root "$work/$SUITE"
        enter_root "$work/$SUITE" "$work/$SUITE-kept" "${shown[@]}" -- "${tests[@]}"
    fi
}

# The first Python >= 3.12 on the PATH that runs; nothing, if there is none.
new_python() {
    local candidate
    for candidate in python3.13 python3.12 python3; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

make_root() {
    local root=$1 program
    [[ -e $root ]] && return
    ((EUID == 0)) || die "no Python >= 3.12 here, and a chroot needs root: run this as root or in a container"
    for program in debootstrap unshare; do
        command -v $program >/dev/null || die "$program is missing: apt-get install debootstrap util-linux"
    done
    say "Debian $SUITE → $root"
    rm -rf "$root.part"
    debootstrap --variant=minbase --include="$(IFS=,; echo "${NEEDED[*]}")" $SUITE "$root.part" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
    mv "$root.part" "$root"
}

# Run this script again inside the root. Mounts and processes are in namespaces of their own and vanish with it.
enter_root() {
    local root=$1 kept=$2 repository=$PWD
    shift 2
    mkdir -p "$kept"
    export root kept repository
    # shellcheck disable=SC2016 # expanded inside
    unshare --mount --pid --fork --kill-child bash -euc '
        see() { mkdir -p "$root$2"; mount --rbind "$1" "$root$2"; }
        see "$repository" /repository
        see "$kept" /kept
        see /dev /dev
        mount -t proc proc "$root/proc"
        cp -L /etc/hosts /etc/resolv.conf "$root/etc" # gloo asks for the address of this host, too
        while [[ $1 != -- ]]; do see "$1" "$1"; shift; done
        exec chroot "$root" env HOME=/root UV_CACHE_DIR=/kept/uv PATH=/usr/local/bin:/usr/bin:/bin \
            bash /repository/tools/newest.sh --work /kept --python python3 "$@"
    ' inside "$@" || die "not all well: see $kept/report.txt"
    say "report: $kept/report.txt"
}

install_and_test() {
    local python=$1 work=$2 environment=$2/venv wanted
    shift 2
    wanted=$("$python" --version; echo "$OVERRIDES"; cat pyproject.toml)
    if [[ ! -e $environment/.installed || $(<"$environment/.installed") != "$wanted" ]]; then
        say "newest versions → $environment"
        rm -f "$environment/.installed"
        "$python" -m venv "$environment"
        "$environment/bin/pip" install -q --disable-pip-version-check uv
        "$environment/bin/uv" pip install --python "$environment/bin/python" --override <(echo "$OVERRIDES") \
            -e ".[train,bench,dev]"
        echo "$wanted" >"$environment/.installed"
    fi
    auto_gptq "$environment/bin/pip"
    {
        versions "$environment/bin/python"
        "$environment/bin/python" -m pytest -vv -o cache_dir="$work/pytest" "${@:-${TESTS[@]}}" 2>&1
    } | tee "$work/report.txt"
}

# The file of AutoGPTQ's wheel that tests compare with, as in the Makefile.
auto_gptq() {
    compgen -G '.cache/auto_gptq-*.whl' >/dev/null ||
        "$1" download -q --no-deps --only-binary=:all: --python-version 3.11 -d .cache auto-gptq==0.7.1
}

versions() {
    "$1" - <<'PYTHON'
import platform
from importlib.metadata import version

print("python", platform.python_version())
for name in ("axolotl", "torch", "triton", "transformers", "peft", "accelerate", "trl", "liger-kernel", "numpy", "zstandard"):
    print(name, version(name))
PYTHON
}

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

main "$@"
exit # before bash reads on, should this file have changed meanwhile
