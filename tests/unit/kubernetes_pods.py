"""What pods look like in the API of Kubernetes: shapes of real ones, whole, as controllers and webhooks make them."""

import copy
import hashlib
import json
import uuid

NODE = "ip-10-0-3-17.ec2.internal"

CONSUL_CONFIG = json.dumps(
    {
        "ConsulDNSIP": "",
        "ConsulDNSPort": 0,
        "ProxyUserID": "5995",
        "ProxyInboundPort": 20000,
        "ProxyOutboundPort": 15001,
        "ExcludeInboundPorts": ["20200"],
        "ExcludeOutboundPorts": None,
        "ExcludeOutboundCIDRs": None,
        "ExcludeUIDs": ["5996"],
        "NetNS": "",
        "IptablesProvider": None,
    }
)


def container(name, *, ports=(), image="registry.local/app:1.4.2"):
    return {
        "name": name,
        "image": image,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [
            {"containerPort": port, "name": label, "protocol": "TCP"}
            if label
            else {"containerPort": port, "protocol": "TCP"}
            for port, label in ports
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
        "volumeMounts": [
            {
                "name": "kube-api-access-7xk2p",
                "readOnly": True,
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
            }
        ],
    }


def container_status(name, *, state="running"):
    states = {
        "running": {"running": {"startedAt": "2026-08-22T10:11:15Z"}},
        "waiting": {"waiting": {"reason": "ContainerCreating"}},
        "terminated": {
            "terminated": {
                "exitCode": 0,
                "reason": "Completed",
                "startedAt": "2026-08-22T10:11:15Z",
                "finishedAt": "2026-08-22T10:12:00Z",
            }
        },
    }
    digest = hashlib.sha256(name.encode()).hexdigest()
    status = {
        "name": name,
        "state": states[state],
        "lastState": {},
        "ready": state == "running",
        "restartCount": 0,
        "image": "registry.local/app:1.4.2",
        "imageID": f"registry.local/app@sha256:{digest}",
    }
    return status if state == "waiting" else status | {"containerID": f"containerd://{digest}"}


def pod(name="web-6d9f7c5b8-x2x7q", *, namespace="shop", uid=None, node=NODE, ip="10.42.1.7"):
    """A pod of a Deployment that runs, without any mesh."""
    uid = uid or str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{namespace}/{name}"))
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "generateName": name.rpartition("-")[0] + "-",
            "namespace": namespace,
            "uid": uid,
            "resourceVersion": "1",
            "creationTimestamp": "2026-08-22T10:11:12Z",
            "labels": {"app": "web", "pod-template-hash": "6d9f7c5b8"},
            "annotations": {"checksum/config": "d41d8cd98f00b204e9800998ecf8427e"},
            "ownerReferences": [
                {
                    "apiVersion": "apps/v1",
                    "kind": "ReplicaSet",
                    "name": name.rpartition("-")[0],
                    "uid": "1b0e7f6a-7a0c-4b0e-9d5e-0a1b2c3d4e5f",
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
            "managedFields": [
                {
                    "manager": "kubelet",
                    "operation": "Update",
                    "apiVersion": "v1",
                    "time": "2026-08-22T10:11:15Z",
                    "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:status": {"f:podIPs": {".": {}, 'k:{"ip":"10.42.1.7"}': {}}}},
                    "subresource": "status",
                }
            ],
        },
        "spec": {
            "volumes": [{"name": "kube-api-access-7xk2p", "projected": {"defaultMode": 420}}],
            "containers": [container("web", ports=[(8080, "http"), (9090, "metrics")])],
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "serviceAccountName": "web",
            "nodeName": node,
            "securityContext": {},
            "schedulerName": "default-scheduler",
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
            "priority": 0,
            "enableServiceLinks": True,
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "lastProbeTime": None}],
            "hostIP": "10.0.3.17",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "startTime": "2026-08-22T10:11:13Z",
            "containerStatuses": [container_status("web")],
            "qosClass": "Burstable",
        },
    }


def annotated(made, **annotations):
    """With annotations, in whose names __ is / and _ is -."""
    made = copy.deepcopy(made)
    for name, value in annotations.items():
        domain, _, rest = name.partition("__")
        made["metadata"]["annotations"][f"{domain.replace('_', '.')}/{rest.replace('_', '-')}"] = (
            value
        )
    return made


def pending():
    """Bound to the node, and nothing of it is made."""
    made = pod("pending-5f7-aaaaa")
    made["status"] = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "qosClass": "Burstable",
    }
    return made


def initialising():
    """Its init container runs: it has an address, and is pending."""
    made = pod("migrating-5f7-aaaaa")
    made["spec"]["initContainers"] = [container("migrate")]
    made["status"] |= {
        "phase": "Pending",
        "initContainerStatuses": [container_status("migrate")],
        "containerStatuses": [container_status("web", state="waiting")],
    }
    return made


def host_network():
    made = pod("node-exporter-9hq2k", namespace="monitoring", ip="10.0.3.17")
    made["spec"]["hostNetwork"] = True
    made["metadata"]["labels"] = {"app.kubernetes.io/name": "node-exporter"}
    made["metadata"]["ownerReferences"][0] |= {"kind": "DaemonSet", "name": "node-exporter"}
    return made


def static():
    """The mirror of a static pod of kubeadm: its own UID, and that of the kubelet in an annotation."""
    made = pod(f"etcd-{NODE}", namespace="kube-system", ip="10.0.3.17")
    made["spec"]["hostNetwork"] = True
    made["spec"]["containers"] = [container("etcd")]
    made["metadata"]["labels"] = {"component": "etcd", "tier": "control-plane"}
    made["metadata"]["annotations"] = {
        "kubeadm.kubernetes.io/etcd.advertise-client-urls": "https://10.0.3.17:2379",
        "kubernetes.io/config.hash": "a3f8c0d1e2b3a4958677685941322110",
        "kubernetes.io/config.mirror": "a3f8c0d1e2b3a4958677685941322110",
        "kubernetes.io/config.seen": "2026-08-22T10:10:00.123456789Z",
        "kubernetes.io/config.source": "file",
    }
    made["metadata"]["ownerReferences"] = [
        {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": "9f", "controller": True}
    ]
    return made


def static_in_its_own_network():
    made = static()
    made["metadata"]["name"] = f"registry-{NODE}"
    made["metadata"]["annotations"]["kubernetes.io/config.hash"] = "0" * 31 + "1"
    del made["spec"]["hostNetwork"]
    return made


def daemon_set():
    made = pod("fluent-bit-4k7zp", namespace="logging")
    made["metadata"]["labels"] = {
        "controller-revision-hash": "7d6c9",
        "pod-template-generation": "3",
    }
    made["metadata"]["ownerReferences"][0] |= {"kind": "DaemonSet", "name": "fluent-bit"}
    made["spec"]["containers"] = [container("fluent-bit")]
    return made


def finished_job():
    """A job of a CronJob, done."""
    made = pod("backup-29112345-xk2lp", namespace="batch")
    made["metadata"]["labels"] = {
        "batch.kubernetes.io/job-name": "backup-29112345",
        "job-name": "backup-29112345",
    }
    made["metadata"]["ownerReferences"][0] |= {"kind": "Job", "name": "backup-29112345"}
    made["spec"]["restartPolicy"] = "Never"
    made["spec"]["containers"] = [container("backup")]
    made["status"] |= {
        "phase": "Succeeded",
        "containerStatuses": [container_status("backup", state="terminated")],
    }
    return made


def running_job():
    made = finished_job()
    made["status"] |= {"phase": "Running", "containerStatuses": [container_status("backup")]}
    return made


def evicted():
    made = pod("greedy-7b9-q2w3e")
    made["status"] = {
        "phase": "Failed",
        "reason": "Evicted",
        "message": "The node was low on resource: memory.",
        "startTime": "2026-08-22T10:11:13Z",
    }
    return made


def terminating():
    made = pod("leaving-6d9-aaaaa")
    made["metadata"] |= {
        "deletionTimestamp": "2026-08-22T11:00:30Z",
        "deletionGracePeriodSeconds": 30,
    }
    return made


def stateful(uid=None):
    made = pod("db-0", uid=uid)
    made["metadata"]["labels"] = {"statefulset.kubernetes.io/pod-name": "db-0"}
    made["metadata"]["ownerReferences"][0] |= {"kind": "StatefulSet", "name": "db"}
    return made


def dual_stack():
    made = pod("dual-6d9-aaaaa")
    made["status"]["podIPs"] = [{"ip": "10.42.1.7"}, {"ip": "fd00:42:0:1::7"}]
    return made


def ipv6_only():
    made = pod("six-6d9-aaaaa", ip="fd00:42:0:1::7")
    made["status"] |= {"hostIP": "fd00:10::17", "hostIPs": [{"ip": "fd00:10::17"}]}
    return made


def unknown():
    """On a node of which the API server has not heard for long."""
    made = pod("lost-6d9-aaaaa")
    made["status"] |= {
        "phase": "Unknown",
        "reason": "NodeLost",
        "message": "Node which was running pod lost-6d9-aaaaa is unresponsive",
        "conditions": [{"type": "Ready", "status": "Unknown"}],
    }
    return made


def debugged(made, name="debugger-8xzrl"):
    """With a container that `kubectl debug` has added while it ran."""
    made = copy.deepcopy(made)
    added = container(name, image="registry.local/netshoot:1")
    del added["ports"], added["resources"]
    made["spec"]["ephemeralContainers"] = [
        added | {"stdin": True, "tty": True, "targetContainerName": "web"}
    ]
    made["status"]["ephemeralContainerStatuses"] = [container_status(name)]
    return made


def user_namespaced():
    made = pod("rootless-6d9-aaaaa")
    made["spec"]["hostUsers"] = False
    return made


def _native(made, name):
    """Its proxy is an init container that stays."""
    containers, statuses = made["spec"]["containers"], made["status"]["containerStatuses"]
    (proxy,) = (one for one in containers if one["name"] == name)
    containers.remove(proxy)
    made["spec"]["initContainers"].append(proxy | {"restartPolicy": "Always"})
    made["status"]["containerStatuses"] = [one for one in statuses if one["name"] != name]
    made["status"]["initContainerStatuses"] = [container_status(name)]
    return made


def consul(*, cni=True, native=False):
    """Injected by consul-k8s, with its CNI plugin or with the init container that redirects; `native` as of 1.8."""
    made = pod("frontend-7c4d8-b8x2v")
    made["metadata"]["labels"] |= {
        "app": "frontend",
        "consul.hashicorp.com/connect-inject-status": "injected",
        "consul.hashicorp.com/connect-inject-managed-by": "consul-k8s-endpoints-controller",
    }
    made["metadata"]["annotations"] |= {
        "consul.hashicorp.com/connect-inject": "true",
        "consul.hashicorp.com/connect-inject-status": "injected",
        "consul.hashicorp.com/connect-k8s-version": "v1.9.0",
        "consul.hashicorp.com/connect-service-port": "http",
        "consul.hashicorp.com/consul-k8s-version": "v1.9.0",
        "consul.hashicorp.com/dual-stack": "false",
        "consul.hashicorp.com/original-pod": json.dumps(pod("frontend-7c4d8-b8x2v")),
        "consul.hashicorp.com/transparent-proxy-status": "enabled",
    }
    if cni:
        made["metadata"]["annotations"]["consul.hashicorp.com/redirect-traffic-config"] = (
            CONSUL_CONFIG
        )
    made["spec"]["initContainers"] = [container("consul-connect-inject-init")]
    made["spec"]["containers"].append(container("consul-dataplane", ports=[(20200, "prometheus")]))
    made["status"]["containerStatuses"].append(container_status("consul-dataplane"))
    return _native(made, "consul-dataplane") if native else made


def consul_without_transparent_proxy():
    made = consul()
    made["metadata"]["name"] = "plain-7c4d8-b8x2v"
    for name in ("transparent-proxy-status", "redirect-traffic-config"):
        del made["metadata"]["annotations"][f"consul.hashicorp.com/{name}"]
    return made


def consul_of_two_services():
    """Consul's pod of several ports: a proxy for each service, no transparent proxy."""
    made = consul_without_transparent_proxy()
    made["metadata"]["name"] = "web-admin-7c4d8-b8x2v"
    made["metadata"]["annotations"] |= {
        "consul.hashicorp.com/connect-service": "web,web-admin",
        "consul.hashicorp.com/connect-service-port": "http,9090",
    }
    made["spec"]["containers"][-1]["name"] = "consul-dataplane-web"
    made["spec"]["containers"].append(container("consul-dataplane-web-admin"))
    return made


def consul_gateway():
    made = pod("mesh-gateway-7c4d8-b8x2v", namespace="consul")
    made["metadata"]["labels"] = {"app": "consul", "component": "mesh-gateway"}
    made["metadata"]["annotations"] |= {
        "consul.hashicorp.com/connect-inject": "false",
        "consul.hashicorp.com/gateway-kind": "mesh-gateway",
    }
    made["spec"]["containers"] = [container("mesh-gateway", ports=[(8443, "gateway")])]
    return made


def istio(*, native=False, cni=True):
    """Injected by Istio; `native`: the proxy is an init container that stays."""
    first = "istio-validation" if cni else "istio-init"
    made = pod("reviews-v1-5b5d-m2kqz")
    made["metadata"]["labels"] |= {
        "app": "reviews",
        "security.istio.io/tlsMode": "istio",
        "service.istio.io/canonical-name": "reviews",
        "service.istio.io/canonical-revision": "v1",
    }
    made["metadata"]["annotations"] |= {
        "istio.io/rev": "default",
        "prometheus.io/port": "15020",
        "prometheus.io/scrape": "true",
        "sidecar.istio.io/status": json.dumps(
            {
                "initContainers": [first, "istio-proxy"] if native else [first],
                "containers": None if native else ["istio-proxy"],
                "volumes": [
                    "workload-socket",
                    "credential-socket",
                    "workload-certs",
                    "istio-envoy",
                ],
                "imagePullSecrets": None,
                "revision": "default",
            }
        ),
    }
    proxy = container("istio-proxy", ports=[(15090, "http-envoy-prom")])
    made["spec"]["initContainers"] = [container(first)]
    made["spec"]["containers"].insert(0, proxy)
    made["status"]["containerStatuses"].append(container_status("istio-proxy"))
    return _native(made, "istio-proxy") if native else made


def istio_gateway():
    made = istio()
    made["metadata"]["name"] = "istio-ingressgateway-5b5d-m2kqz"
    made["spec"]["containers"] = [
        container("istio-proxy", ports=[(8080, "http2"), (8443, "https")])
    ]
    return made


def istio_ambient():
    made = pod("ambient-5b5d-m2kqz")
    made["metadata"]["annotations"]["ambient.istio.io/redirection"] = "enabled"
    return made


def linkerd(*, native=False):
    made = pod("voting-5b5d-m2kqz")
    made["metadata"]["annotations"] |= {
        "linkerd.io/created-by": "linkerd/proxy-injector stable-2.14.10",
        "linkerd.io/inject": "enabled",
        "linkerd.io/proxy-version": "stable-2.14.10",
    }
    made["spec"]["initContainers"] = [container("linkerd-init")]
    made["spec"]["containers"].insert(
        0, container("linkerd-proxy", ports=[(4143, "linkerd-proxy")])
    )
    made["status"]["containerStatuses"].append(container_status("linkerd-proxy"))
    if native:
        made["metadata"]["annotations"]["config.alpha.linkerd.io/proxy-enable-native-sidecar"] = (
            "true"
        )
    return _native(made, "linkerd-proxy") if native else made


def kuma():
    made = pod("demo-5b5d-m2kqz")
    made["metadata"]["annotations"] |= {
        "kuma.io/mesh": "default",
        "kuma.io/sidecar-injected": "true",
        "kuma.io/transparent-proxying": "enabled",
    }
    made["spec"]["initContainers"] = [container("kuma-init")]
    made["spec"]["containers"].append(container("kuma-sidecar"))
    return made
