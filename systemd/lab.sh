#!/bin/sh
# Makes this machine one node of a lab of several: lab.sh NODE NODE=ADDRESS..., with the lab's file and what its machines
# have in common in /tmp/tidegate (Vagrantfile). tidegate is installed. It may be repeated, also with another file.
set -eu

[ $# -ge 2 ] || { echo "usage: $0 NODE NODE=ADDRESS..." >&2; exit 2; }
node=$1
shift

from=/tmp/tidegate
lab=/etc/tidegate/lab
install -d -m 0700 "$lab"
chmod 0700 "$from/secrets"
for secret in "$from"/secrets/*; do
    install -m 0600 "$secret" "$lab/"
done

# Another file may have other services, or give them other addresses: their places are made anew.
if [ -e "$lab/lab.yaml" ] && ! cmp -s "$from/lab.yaml" "$lab/lab.yaml"; then
    for unit in $(cat "$lab/services"); do
        [ -e "/etc/systemd/system/$unit" ] || continue
        systemctl disable --quiet --now "$unit"
        systemctl stop "tidegate-sidecar@$unit"
        rm -r "/etc/systemd/system/$unit" "/etc/systemd/system/$unit.d"
    done
fi

set -- $(printf -- '--at %s ' "$@")
units=$(/opt/tidegate/bin/python -m tidegate.lab.machine "$from/lab.yaml" --node "$node" "$@")
before= server= services=
for unit in $units; do
    case $unit in
    tidegate-server.service) server=$unit ;;
    tidegate-*) before="$before $unit" ;;
    *) services="$services $unit" ;;
    esac
done
echo "$services" > "$lab/services"

sysctl --quiet --load /etc/sysctl.d/90-tidegate.conf
systemctl daemon-reload
# shellcheck disable=SC2086 # one word for each unit
systemctl enable --quiet $units
if [ -n "$server" ]; then
    systemctl restart "$server"
    # What the last file had is written already; changed since then, by `tidegate strict` say, it stays so.
    [ ! -e "$lab/entries.json" ] || /opt/tidegate/bin/tidegate config write "$lab/entries.json"
fi
# The agent before the services: those wait for their sidecars, and without them start closed.
# shellcheck disable=SC2086
systemctl restart $before
# shellcheck disable=SC2086
[ -z "$services" ] || systemctl restart $services
install -m 0644 "$from/lab.yaml" "$lab/"
