"""A Kubernetes cluster as one of its nodes sees it: an API server (tests/unit/kubernetes_api.py), and pods on the node.

A pod is an object of the API and a sandbox (sandboxes.py). It comes to life in the order in which a kubelet does it.
"""

import asyncio
import copy
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from kubernetes_api import KubernetesApi
from kubernetes_pods import annotated, pod
from nodeagents import Agent
from nodes import Node
from plugins import TYPE
from sandboxes import Answer, Sandbox

NODE_NAME = "node-1"
PLUGIN = {"type": TYPE, "tidegate": {"wait_s": 0}}
"""The plugin's entry in the conflist: Kubernetes says which pods are redirected."""
OWN_SIDECAR = {"tidegate_io__mesh": "own"}

_TOKEN = Path("/etc/tidegate/token")
_DEADLINE_S = 30
_T = TypeVar("_T")


class Cluster:
    """The API server, in the node's network, and the node's pods."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.api = KubernetesApi()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=node.run, args=(self._loop.run_forever,))

    def __enter__(self) -> "Cluster":
        self._thread.start()
        self.do(self.api.start())
        self.node.run(lambda: _TOKEN.parent.mkdir(exist_ok=True) or _TOKEN.write_text("token"))
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self.api.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def agent(self, **settings: object) -> Agent:
        """The node's agent, which answers the plugin and knows this cluster; it does not run yet.

        `settings` are those of its section `kubernetes`.
        """
        kubernetes = {
            "server": self.api.address,
            "token_file": str(_TOKEN),
            "ca_file": str(_TOKEN),
            "node": NODE_NAME,
            **settings,
        }
        return Agent(self.node, cni={}, kubernetes=kubernetes)

    def do(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Has the API server do something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE_S)

    def bind(self, sandbox: Sandbox, **annotations: str) -> None:
        """The scheduler has chosen the node: the pod has no address, and nothing of it runs."""
        made = annotated(_object(sandbox), **(annotations or OWN_SIDECAR))
        made["status"] = {"phase": "Pending", "qosClass": "BestEffort"}
        self.do(self.api.put(made))

    def runs(self, sandbox: Sandbox, **annotations: str) -> None:
        """The kubelet tells that the pod runs."""
        self.do(self.api.put(annotated(_object(sandbox), **(annotations or OWN_SIDECAR))))

    def runs_as(self, sandbox: Sandbox, shape: Any) -> None:
        """There is a pod of this shape (tests/unit/kubernetes_pods.py), and the sandbox is its own."""
        made = copy.deepcopy(shape)
        made["metadata"] |= {"name": sandbox.name, "namespace": sandbox.namespace}
        made["spec"]["nodeName"] = NODE_NAME
        if "kubernetes.io/config.mirror" not in made["metadata"]["annotations"]:
            made["metadata"]["uid"] = sandbox.uid
        made["status"] |= {"podIP": sandbox.address, "podIPs": [{"ip": sandbox.address}]}
        self.do(self.api.put(made))

    def gone(self, sandbox: Sandbox) -> None:
        """The pod is deleted."""
        self.do(self.api.delete(_object(sandbox)))

    def start(
        self, name: str, *, process: bool = True, **annotations: str
    ) -> tuple[Sandbox, Answer]:
        """A pod from its binding until it runs, unless the plugin refuses: then what that said."""
        sandbox = Sandbox(self.node, name)
        self.bind(sandbox, **annotations)
        sandbox.make(process=process)
        answer = sandbox.call("ADD", PLUGIN)
        if not answer.code:
            self.runs(sandbox, **annotations)
        return sandbox, answer

    def stop(self, sandbox: Sandbox) -> Answer:
        """A pod's end, as the kubelet and the runtime bring it about."""
        answer = sandbox.call("DEL", PLUGIN)
        sandbox.remove()
        self.gone(sandbox)
        return answer


def _object(sandbox: Sandbox) -> Any:
    return pod(
        sandbox.name,
        namespace=sandbox.namespace,
        uid=sandbox.uid,
        node=NODE_NAME,
        ip=sandbox.address,
    )
