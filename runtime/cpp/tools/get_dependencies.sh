#!/usr/bin/env bash
# Puts what the C++ runtime is built with into a folder, without root and without installing anything:
#
#     runtime/cpp/tools/get_dependencies.sh FOLDER PYTHON
#     cmake -S . -B build/cpp -G Ninja -DCMAKE_PREFIX_PATH="$PWD/FOLDER"
#
# nlohmann's JSON library, CLI11, GoogleTest's sources, libpng and zlib as static libraries, and ONNX
# Runtime's headers come from Debian's packages by way of apt, which checks their signatures; ONNX
# Runtime's library is that of PYTHON's package, a later release: its C interface only grows. Exits
# with 3 where there is no apt.
set -euo pipefail

release=trixie # the first Debian with ONNX Runtime; of what is taken from it, libpng and zlib alone run
packages=(nlohmann-json3-dev libonnxruntime-dev googletest libcli11-dev libpng-dev zlib1g-dev)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

if [[ $# -ne 2 ]]; then
    echo "usage: get_dependencies.sh FOLDER PYTHON" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
library=$("$2" - <<'PYTHON'
import importlib.util
import pathlib

package = importlib.util.find_spec("onnxruntime")
folders = package.submodule_search_locations if package else []
found = [file for folder in folders for file in pathlib.Path(folder).glob("capi/libonnxruntime.so.1*")]
print(found[0] if found else "")
PYTHON
)
if [[ -z $library ]]; then
    echo "get_dependencies.sh: expected onnxruntime in $2, but found none; pip install onnxruntime" >&2
    exit 2
fi

include=$folder/include
if [[ ! -e $include/onnxruntime || ! -e $include/png.h || ! -e $include/CLI ]]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null || [[ ! -e $keyring ]]; then
        echo "get_dependencies.sh: expected apt and Debian's keys, but found none; install nlohmann-json," \
            "GoogleTest's sources, CLI11, libpng and ONNX Runtime's headers, and set CMAKE_PREFIX_PATH" >&2
        exit 3
    fi
    work=$(mktemp -d "$folder/.work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{lists/partial,cache/archives/partial,root,packages}
    echo "deb [signed-by=$keyring] http://deb.debian.org/debian $release main" >"$work/sources.list"
    apt=(apt-get -qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
    "${apt[@]}" update
    (cd "$work/packages" && "${apt[@]}" download "${packages[@]}")
    for package in "$work"/packages/*.deb; do
        dpkg -x "$package" "$work/root"
    done
    rm -rf "$folder"/{share,src,include}
    mkdir -p "$folder/lib"
    mv "$work"/root/usr/lib/*/lib{png,png16,z}.a "$folder/lib"
    mv "$work"/root/usr/{share,src} "$folder"
    mv "$work/root/usr/include" "$folder" # last: says that all is there
fi
mkdir -p "$folder/lib"
ln -sf "$library" "$folder/lib/libonnxruntime.so.1"
ln -sf libonnxruntime.so.1 "$folder/lib/libonnxruntime.so"
