#!/bin/sh
# Makes this machine one node of a lab of several: lab.sh NODE NODE=ADDRESS..., with the lab's file and what its machines
# have in common in /tmp/tidegate (Vagrantfile). tidegate is installed. It may be repeated.
set -eu

[ $# -ge 2 ] || { echo "usage: $0 NODE NODE=ADDRESS..." >&2; exit 2; }
node=$1
shift

from=/tmp/tidegate
apps=/etc/tidegate/lab
install -d -m 0700 "$apps"
for secret in "$from"/secrets/*; do
    install -m 0600 "$secret" "$apps/"
done

set -- $(printf -- '--at %s ' "$@")
units=$(/opt/tidegate/bin/python -m tidegate.lab.machine "$from/lab.yaml" --node "$node" "$@")
sysctl --quiet --load /etc/sysctl.d/90-tidegate.conf
systemctl daemon-reload
# The agent and the server before the services: those would wait for their sidecars, and without them start closed.
for unit in $units; do
    systemctl enable --quiet "$unit"
    systemctl restart "$unit"
    if [ "$unit" = tidegate-server.service ]; then
        for entry in "$apps"/entries/*; do
            /opt/tidegate/bin/tidegate config write "$entry"
        done
    fi
done
