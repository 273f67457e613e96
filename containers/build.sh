#!/usr/bin/env bash
# Builds fedloom's images: containers/build.sh [--engine docker|buildah] [IMAGE …], IMAGE one of server, site, simulator,
# evaluation; all of them by default.
#
# Docker builds them where its daemon answers. Elsewhere buildah does, with chroot isolation, which needs no daemon, no
# registry of images and no control groups; its base image is made by debootstrap (root is needed for that).
#
# Environment:
#   BASE         an image of Debian 12 to build on: debian:bookworm-slim under Docker, a fresh debootstrap under buildah
#   MIRROR       the Debian mirror that debootstrap asks; its own default otherwise
#   APT_SOURCES  a file of apt's sources for the build (.sources format); this machine's own if it runs the same Debian
#   PYTHON       whose pip configuration is handed to the build; python3 by default
# Where pip and apt get their packages is handed in as secrets, and as read-only folders to a stage that no image contains:
# nothing of it stays in an image.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
suite=bookworm
known=(server site simulator evaluation)
engine=
images=()

refuse() {
    echo "build.sh: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --engine) engine=${2?build.sh: --engine needs docker or buildah}; shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) refuse "there is no option $1: take --engine or --help" ;;
        *)
            [[ " ${known[*]} " == *" $1 "* ]] || refuse "there is no image $1: take one of ${known[*]}"
            images+=("$1")
            shift
            ;;
    esac
done
[ ${#images[@]} -gt 0 ] || images=("${known[@]}")

daemon() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }
case $engine in
    '')
        if daemon; then
            engine=docker
        elif command -v buildah >/dev/null; then
            engine=buildah
        else
            refuse "no Docker daemon answers and there is no buildah: start Docker, or apt-get install buildah debootstrap"
        fi
        ;;
    docker) daemon || refuse "no Docker daemon answers: start it, or take --engine buildah" ;;
    buildah) command -v buildah >/dev/null || refuse "there is no buildah: apt-get install buildah debootstrap" ;;
    *) refuse "--engine $engine: take docker or buildah" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 077
places=$("$python" "$here/pip_conf.py" "$work") || exit 2
handed=(--secret "id=pip,src=$work/pip.conf")
[ ! -f "$work/ca.crt" ] || handed+=(--secret "id=ca,src=$work/ca.crt")
if [ "$engine" = docker ] && [ -n "$places" ]; then
    refuse "pip's configuration names ${places%%$'\n'*}, which a Docker build cannot see: take --engine buildah, or an index by its address"
fi

sources=${APT_SOURCES-}
if [ -z "$sources" ] && [ "$engine" = buildah ] && grep -qs "^VERSION_CODENAME=$suite$" /etc/os-release; then
    [ ! -s /etc/apt/sources.list.d/debian.sources ] || sources=/etc/apt/sources.list.d/debian.sources
fi
if [ -n "$sources" ]; then
    [ -s "$sources" ] || refuse "APT_SOURCES=$sources: there is no such file"
    handed+=(--secret "id=apt,src=$sources")
fi

# Everything that decides what the wheels are; a builder that does not look into mounts goes by it.
requirements=$(cd "$root" && cat pyproject.toml constraints.txt containers/{requirements.py,wheelhouse.sh,install.sh} | sha256sum | cut -c1-16)
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/fedloom/common/version.py")
revision=$(git -C "$root" describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)
arguments=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "REQUIREMENTS=$requirements")
[ -z "${BASE-}" ] || arguments+=(--build-arg "BASE=$BASE")

make_base() {
    local name=localhost/fedloom-base:$suite container
    if ! buildah inspect --type image "$name" >/dev/null 2>&1; then
        command -v debootstrap >/dev/null || refuse "there is no debootstrap to make a base with: apt-get install debootstrap, or name an image with BASE=…"
        [ "$(id -u)" = 0 ] || refuse "debootstrap has to run as root: run this as root, or name an image with BASE=…"
        echo "making $name with debootstrap" >&2
        debootstrap --variant=minbase "$suite" "$work/base" ${MIRROR+"$MIRROR"} >"$work/debootstrap.log" 2>&1 ||
            { tail -n 3 "$work/debootstrap.log" >&2; refuse "debootstrap failed: name a mirror with MIRROR=…, or an image with BASE=…"; }
        rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/* "$work"/base/var/log/* \
            "$work"/base/usr/share/{man,locale,info}/*
        find "$work/base/usr/share/doc" -type f ! -name copyright -delete
        find "$work/base/usr/share/doc" -type d -empty -delete
        [ -z "${MIRROR-}" ] || rm -f "$work/base/etc/apt/sources.list" # a mirror of this machine is nothing to others
        tar -C "$work/base" -cf "$work/base.tar" .
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$work/base.tar" / >/dev/null
        buildah config --cmd /bin/bash "$container"
        buildah commit --quiet --rm "$container" "$name" >/dev/null
        rm -rf "$work/base" "$work/base.tar"
    fi
    arguments+=(--build-arg "BASE=$name")
}

build() { # TARGET IMAGE [OPTION …]: one stage of the Dockerfile as an image
    local target=$1 image=$2 began=$SECONDS
    shift 2
    if [ "$engine" = docker ]; then
        DOCKER_BUILDKIT=1 docker build --quiet -f "$here/Dockerfile" --target "$target" -t "$image" \
            "${arguments[@]}" "${handed[@]}" "$@" "$root" >/dev/null
    else # the format, since only Docker's knows health checks
        buildah bud --quiet --isolation chroot --layers --force-rm --format docker -f "$here/Dockerfile" --target "$target" \
            -t "localhost/$image" "${arguments[@]}" "${handed[@]}" "$@" "$root" >/dev/null
    fi
    printf '%s  %s  %s s\n' "$image" "$(size "$image")" "$((SECONDS - began))"
}

size() {
    if [ "$engine" = docker ]; then docker images --format '{{.Size}}' "$1" | head -n 1
    else buildah images --format '{{.Size}}' "localhost/$1" | head -n 1; fi
}

if [ "$engine" = buildah ]; then
    [ -n "${BASE-}" ] || make_base
    # The folders that pip's configuration names are seen by the stage that collects wheels, and by no other: the stages
    # that images are made of are built before it and after it without them.
    seen=()
    for place in $places; do seen+=(--volume "$place:$place:ro"); done
    build python "fedloom-python:$version"
    build wheels "fedloom-wheels:$requirements" "${seen[@]}"
    arguments+=(--build-arg "WHEELS=localhost/fedloom-wheels:$requirements")
fi
for image in "${images[@]}"; do
    build "$image" "fedloom-$image:$version"
    if [ "$engine" = docker ]; then docker tag "fedloom-$image:$version" "fedloom-$image"
    else buildah tag "localhost/fedloom-$image:$version" "localhost/fedloom-$image"; fi
done
