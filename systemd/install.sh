#!/bin/sh
# Installs tidegate on a Debian 12 machine with systemd, from a checkout: packages, /opt/tidegate, units, the sidecars'
# user. It may be repeated, also to upgrade. It configures and enables nothing (docs/systemd.md).
#
# With TIDEGATE_WHEELS, a directory of wheels of tidegate and all that it needs, nothing is fetched and nothing is built.
set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
home=/opt/tidegate

run="ca-certificates iproute2 iptables libbpf1 libnftables1 python3 python3-venv"
build="clang gcc libbpf-dev libc6-dev linux-libc-dev llvm make musl-tools python3-dev"

# install PACKAGE...: those that are not there yet.
install_packages() {
    missing=
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    # shellcheck disable=SC2086 # one word for each package
    apt-get -qq install -y --no-install-recommends $missing >/dev/null
}

[ "$(id -u)" = 0 ] || { echo "$0 installs packages and units: run it as root" >&2; exit 1; }

# shellcheck disable=SC2086
install_packages $run
[ -x "$home/bin/python" ] || python3 -m venv "$home"
if [ -n "${TIDEGATE_WHEELS:-}" ]; then
    "$home/bin/pip" install --quiet --no-index --find-links "$TIDEGATE_WHEELS" --upgrade 'tidegate[lab]'
else
    # shellcheck disable=SC2086
    install_packages $build
    make --silent -C "$checkout/bpf"
    make --silent -C "$checkout/init/cni"
    "$home/bin/pip" install --quiet --upgrade "$checkout[lab]"
fi
ln -sf "$home/bin/tidegate" /usr/local/bin/tidegate

install -D -m 0644 "$checkout/systemd/tidegate.sysusers.conf" /usr/lib/sysusers.d/tidegate.conf
systemd-sysusers /usr/lib/sysusers.d/tidegate.conf
for unit in tidegate-agent.service tidegate-server.service tidegate-sidecar@.service; do
    install -m 0644 "$checkout/systemd/$unit" "/etc/systemd/system/$unit"
done
install -d -m 0755 /etc/tidegate
# Where no systemd runs, as in an image that is being made, the first one reads them.
[ ! -d /run/systemd/system ] || systemctl daemon-reload
