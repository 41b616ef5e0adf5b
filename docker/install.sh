#!/bin/sh
# Installation for `make` and both images: run it in the folder of constraints.txt, with the right pip on PATH.
#
#   docker/install.sh torch [BUILD]    torch at the version in constraints.txt; with BUILD (cpu), only that build
#   docker/install.sh requirements     the dependencies in pyproject.toml, at the versions in constraints.txt
#   docker/install.sh ARGUMENT...      any other arguments of `pip install`, at those versions
set -eu

install() {
    pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt "$@"
}

# pip would compile to bytecode on one core, and the packages' own tests too. Some files are no valid Python.
compile() {
    packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -m compileall -q -j 0 -x '/tests/' "$packages" >/dev/null || true
}

case "$1" in
torch)
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if [ -z "${2:-}" ]; then
        install "torch==$version"
    elif ! install "torch==$version+$2"; then
        echo "error: no $2 build of torch $version; where pip found none, name a package index that has it:" >&2
        echo "build argument TORCH_INDEX, see docs/containers.md" >&2
        exit 1
    fi
    ;;
requirements)
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' |
        install --requirement /dev/stdin
    ;;
*)
    install "$@"
    ;;
esac
compile
