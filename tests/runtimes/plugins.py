"""tidegate's CNI plugin as it stands in a chain: the program, and its entry in the conflist."""

import shutil
from collections.abc import Mapping

from containers import PLUGINS
from nodes import REPOSITORY, Node

BINARY = REPOSITORY / "agent/tidegate/plugins/tidegate-cni"

TYPE = "tidegate-cni"


def entry(**settings: object) -> Mapping[str, object]:
    """What stands in a conflist, with these settings of tidegate's."""
    return {"type": TYPE, "tidegate": settings}


FREEZER = {"type": "freeze-agent"}
"""Behind tidegate's plugin: the agent does nothing from ADD to DEL, so what a container meets is what ADD has done."""

_FREEZER = """#!/bin/sh
case "$CNI_COMMAND" in
ADD) kill -STOP "$(cat /run/tidegate/agent.pid)" ;;
DEL) kill -CONT "$(cat /run/tidegate/agent.pid)" ;;
esac
exec python3 -c '
import json, os, sys
command, versions = os.environ["CNI_COMMAND"], ["0.3.1", "0.4.0", "1.0.0"]
if command == "ADD":
    print(json.dumps(json.load(sys.stdin)["prevResult"]))
elif command == "VERSION":
    print(json.dumps({"cniVersion": "1.0.0", "supportedVersions": versions}))
'
"""

MESHED = entry(mesh=True, sidecar="own")
"""Without Kubernetes: the network's containers are redirected to sidecars that they have themselves."""


def install(node: Node) -> None:
    """Puts the plugins where runtimes look for them."""

    def copy() -> None:
        PLUGINS.mkdir(parents=True, exist_ok=True)
        shutil.copy(BINARY, PLUGINS / TYPE)
        freezer = PLUGINS / FREEZER["type"]
        freezer.write_text(_FREEZER)
        freezer.chmod(0o755)

    node.run(copy)
