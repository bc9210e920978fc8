#!/usr/bin/env bash
# Puts what the C++ runtime is built with into a folder, without root and without installing anything:
#
#     runtime/cpp/tools/get_dependencies.sh FOLDER PYTHON
#     cmake -S . -B build/cpp -G Ninja -DCMAKE_PREFIX_PATH="$PWD/FOLDER"
#
# nlohmann's JSON library, CLI11, libpng and zlib, GoogleTest, the headers of OpenSSL and of ONNX
# Runtime come from Debian's packages by way of apt, which checks their signatures. OpenSSL's libcrypto
# is the system's; ONNX Runtime's library is that of PYTHON's package, a later release: its C interface
# only grows. Exits with 3 where there is no apt, or no Debian.
set -euo pipefail

release=trixie # the first Debian with ONNX Runtime; of what is taken from it, libpng and zlib alone run
packages=(nlohmann-json3-dev libonnxruntime-dev libcli11-dev libpng-dev zlib1g-dev)
own_packages=(libgtest-dev libssl-dev) # made for this system's C and C++ libraries
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

absent() {
    echo "get_dependencies.sh: expected $1, but found none; install nlohmann-json, GoogleTest, OpenSSL," \
        "CLI11, libpng and ONNX Runtime's headers, and set CMAKE_PREFIX_PATH" >&2
    exit 3
}

include=$folder/include
if [[ ! -e $include/onnxruntime || ! -e $include/openssl || ! -e $include/gtest || ! -e $include/CLI ]]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null || [[ ! -e $keyring ]]; then
        absent "apt and Debian's keys"
    fi
    own_release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    archive=$(apt-get update --print-uris |
        sed -n "s|^'\(.*/debian\)/dists/$own_release/InRelease' .*|\1|p")
    [[ -n $archive ]] || absent "an archive of Debian $own_release among apt's sources"
    crypto=$(/sbin/ldconfig -p | awk '$1 == "libcrypto.so.3" { print $NF }')
    [[ -n $crypto ]] || absent "the system's libcrypto.so.3"

    work=$(mktemp -d "$folder/.work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{lists/partial,cache/archives/partial,root,packages}
    printf "deb [signed-by=$keyring] ${archive%%$'\n'*} %s main\n" "$release" "$own_release" | sort -u \
        >"$work/sources.list"
    apt=(apt-get -qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
    "${apt[@]}" update
    (cd "$work/packages" &&
        "${apt[@]}" download "${packages[@]/%//$release}" "${own_packages[@]/%//$own_release}")
    for package in "$work"/packages/*.deb; do
        dpkg -x "$package" "$work/root"
    done
    usr=$work/root/usr
    # Of libraries, what is left is static and needs nothing but the C and C++ libraries.
    find "$usr/lib" \( -name '*.so*' -o -name libcrypto.a -o -name libssl.a \) -delete
    mv "$usr"/include/*-linux-*/openssl/* "$usr/include/openssl" # elsewhere only the system's is looked for
    rm -rf "$folder"/{include,lib,share,src}
    ln -s "${crypto%%$'\n'*}" "$usr/lib/libcrypto.so"
    mv "$usr"/{lib,share} "$folder"
    mv "$usr/include" "$folder" # last: says that all is there
fi
ln -sf "$library" "$folder/lib/libonnxruntime.so.1"
ln -sf libonnxruntime.so.1 "$folder/lib/libonnxruntime.so"
