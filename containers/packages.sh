#!/bin/sh
# Installs Debian packages in a build stage and leaves nothing of apt's own behind: packages.sh NAME…
# Sources that the build was handed (/run/handed/apt.sources) stand in for the base image's.
set -eu

options=
if [ -s /run/handed/apt.sources ]; then
    options="-o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts=/run/handed"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get $options update -qq
apt-get $options upgrade -qq -y >/dev/null # a base may be older than its last security fixes
apt-get $options install -qq -y --no-install-recommends "$@" >/dev/null
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log
