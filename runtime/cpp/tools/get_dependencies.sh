#!/usr/bin/env bash
# Puts what the C++ runtime is built with into a folder, without root and without installing anything:
#
#     runtime/cpp/tools/get_dependencies.sh FOLDER ONNXRUNTIME
#     cmake -S . -B build/cpp -DCMAKE_PREFIX_PATH="$PWD/FOLDER"
#
# ONNXRUNTIME is a Python that has the package onnxruntime, or the folder of one of ONNX Runtime's
# release archives, unpacked (include/, lib/). Its library is copied. The package has no headers: older
# ones will do for it, as the C interface only grows.
#
# The rest comes by apt, from the sources and with the keys that this system is set up with. Where its
# release lacks headers, or has older ones, the same sources are asked for a later release's. OpenSSL's
# libcrypto stays the system's, which mends it: the folder has the link that libssl-dev would install.
# Exits with 3 where these cannot be had.
set -euo pipefail

headers=(nlohmann-json3-dev=3.9 libcli11-dev=2.4) # and the oldest versions that will do
libraries=(libpng-dev zlib1g-dev libgtest-dev libssl-dev)
later_release=trixie # the first Debian that has them all

fail() { # EXIT_CODE WORDS..
    echo "get_dependencies.sh: expected ${*:2}" >&2
    exit "$1"
}

absent() { # WORDS..
    fail 3 "$*; install nlohmann-json, CLI11, libpng, GoogleTest, OpenSSL and ONNX Runtime with their" \
        "headers in another way, and set CMAKE_PREFIX_PATH"
}

if [[ $# -ne 2 ]]; then
    echo "usage: get_dependencies.sh FOLDER ONNXRUNTIME" >&2
    exit 2
fi

if [[ -d $2 ]]; then
    from=$2/lib
    [[ -e $2/include/onnxruntime_c_api.h ]] ||
        fail 2 "a release archive of ONNX Runtime, unpacked, but got $2, which has no" \
            "include/onnxruntime_c_api.h"
else
    from=$("$2" -c 'from importlib.util import find_spec
package = find_spec("onnxruntime")
print(package.submodule_search_locations[0] + "/capi" if package else "")' 2>/dev/null || true)
    headers+=(libonnxruntime-dev=1.21)
fi
library=$(find "$from" -name 'libonnxruntime.so.1.*' -type f -print -quit 2>/dev/null || true)
[[ -n $library ]] ||
    fail 2 "ONNX Runtime's library, libonnxruntime.so.1.X.Y, in $2, but found none; pip install" \
        "onnxruntime, or unpack its release archive"

mkdir -p "$1"
folder=$(cd "$1" && pwd)
work=$(mktemp -d "$folder/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Packages

apt_of() { # RELEASE TOOL ARGUMENTS..: apt-get or apt-cache, with package lists of its own
    "$2" -qq -o "Dir::Etc::SourceList=$work/$1/sources.list" \
        -o "Dir::Etc::SourceParts=$work/$1/sources.list.d" -o "Dir::State::Lists=$work/$1/lists" \
        -o Dir::State::Status=/dev/null -o "Dir::Cache=$work/$1/cache" -o APT::Sandbox::User= "${@:3}"
}

update() { # RELEASE
    local list parts
    eval "$(apt-config shell list Dir::Etc::SourceList/f parts Dir::Etc::SourceParts/d)"
    mkdir -p "$work/$1"/{sources.list.d,lists/partial,cache/archives/partial}
    touch "$work/$1/sources.list"
    [[ ! -e $list ]] || cp "$list" "$work/$1/sources.list"
    [[ ! -d $parts ]] || cp -r "$parts/." "$work/$1/sources.list.d"
    find "$work/$1"/sources.list* -type f -exec sed -i "s/\b$own_release\b/$1/g" {} +
    apt_of "$1" apt-get update 2>"$work/$1/log" || true # other sources than Debian's may be down
}

take() { # RELEASE: download those packages that it has, and leave the others in `packages`
    local name oldest version found=() rest=()
    local -A versions
    update "$1"
    while IFS='=' read -r name version; do
        versions[$name]=$version
    done < <(apt_of "$1" apt-cache show --no-all-versions "${packages[@]%=*}" 2>/dev/null |
        awk '/^Package: / { name = $2 } /^Version: / { print name "=" $2 }')
    for package in "${packages[@]}"; do
        IFS='=' read -r name oldest <<<"$package"
        version=${versions[$name]-}
        if [[ -n $version ]] && dpkg --compare-versions "$version" ge "$oldest"; then
            found+=("$name")
        else
            rest+=("$package")
        fi
    done
    [[ -z ${found[*]} ]] || (cd "$work/packages" && apt_of "$1" apt-get download "${found[@]}") ||
        absent "apt to download ${found[*]}, but it did not"
    packages=("${rest[@]}")
}

packages=()
for package in "${libraries[@]/%/=0}" "${headers[@]}"; do
    [[ -e $folder/share/doc/${package%=*} ]] || packages+=("$package")
done
if [[ ${#packages[@]} -gt 0 ]]; then
    for tool in apt-get dpkg; do
        command -v "$tool" >/dev/null || absent "$tool, but found none"
    done
    own_release=$(. /etc/os-release && echo "${VERSION_CODENAME:-this}")
    mkdir -p "$work"/{packages,root}
    take "$own_release"
    if [[ -n ${packages[*]} && " ${packages[*]} " != *"=0 "* && $own_release != $later_release ]]
    then
        echo "get_dependencies.sh: of $later_release, as $own_release has none: ${packages[*]%=*}" >&2
        take "$later_release"
    fi
    [[ -z ${packages[*]} ]] ||
        absent "${packages[*]//=/ } or later among apt's packages, but found none"
    for package in "$work"/packages/*.deb; do
        dpkg -x "$package" "$work/root"
    done
    usr=$work/root/usr
    # Of libraries, what is left is static and needs nothing but the C and C++ libraries.
    find "$usr/lib" \( -name '*.so*' -o -name libcrypto.a -o -name libssl.a \) -delete
    rm -rf "$usr"/{lib/*-linux-*,share,lib}/pkgconfig # their paths are those of an installed package
    for system in "$usr"/include/*-linux-*; do # compilers look there for the system's alone
        [[ ! -d $system ]] || cp -r "$system/." "$usr/include"
    done
    [[ ! -d $usr/include/onnxruntime ]] || rm -rf "$folder/include/onnxruntime"
    cp -r "$usr"/{include,lib} "$folder"
    cp -r "$usr/share" "$folder" # last: says which packages are there
fi

link() { # TARGET LINK: what is right is left, as a program that is linked with it may start meanwhile
    [[ $(readlink "$2") == "$1" ]] || ln -sf "$1" "$2"
}

crypto=$(/sbin/ldconfig -p | awk '$1 == "libcrypto.so.3" { print $NF }')
[[ -n $crypto ]] || absent "the system's libcrypto.so.3, but found none"
link "${crypto%%$'\n'*}" "$folder/lib/libcrypto.so"

# ONNX Runtime

if [[ -d $2 ]]; then
    rm -rf "$folder"/{include/onnxruntime,share/doc/libonnxruntime-dev}
    cp -r "$2/include" "$folder/include/onnxruntime"
fi
header=$(find "$folder/include/onnxruntime" -name onnxruntime_c_api.h -print -quit)
oldest=1.$(sed -n 's/^#define ORT_API_VERSION \([0-9]*\).*/\1/p' "$header")
dpkg --compare-versions "${library##*.so.}" ge "$oldest" ||
    fail 2 "ONNX Runtime $oldest or later in $2, as the headers are of that version, but got" \
        "${library##*.so.}; update it"
for file in "$folder"/lib/libonnxruntime*; do # of another release
    [[ -L $file || -e $from/${file##*/} ]] || rm -f "$file"
done
for file in "$library" "$from"/libonnxruntime_providers_*.so; do
    # What is linked with it is linked again when it is another.
    [[ ! -e $file ]] || cmp -s "$file" "$folder/lib/${file##*/}" ||
        cp --remove-destination "$file" "$folder/lib"
done
link "${library##*/}" "$folder/lib/libonnxruntime.so.1"
link libonnxruntime.so.1 "$folder/lib/libonnxruntime.so"
