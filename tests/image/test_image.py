"""The image is built from Debian's packages, is small, gives nobody rights, and redirects a pod in a real container."""

import http.client
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import tomllib
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
import yaml
from building import REPOSITORY, Builder, Container
from namespaces import landing, pair_of, serving

from tidegate.enforce.redirect.engine import Engine
from tidegate.intent.policy import DEFAULT
from tidegate.kernel import netns
from tidegate.node.init import Failure

pytestmark = pytest.mark.timeout(1800)

DEPLOY = REPOSITORY / "deploy"
LARGEST_MB = 190
APP, INBOUND, OUTBOUND = 8080, 20000, 15001
NET_ADMIN = ("CAP_NET_ADMIN",)
COMPILERS = ("clang", "gcc", "cc", "make", "ld", "pip", "pip3", "curl", "wget")


@pytest.fixture(scope="module")
def directory():
    # Layers are many gigabytes where they are copied: they go before the next test does.
    made = Path(tempfile.mkdtemp(prefix="tg-image-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def builder(directory):
    if os.geteuid() != 0:
        pytest.skip("images are built as root")
    made = Builder(directory)
    made.make_base()
    made.build()
    return made


@pytest.fixture(scope="module")
def root(builder):
    return builder.unpack()


@pytest.fixture(scope="module")
def container(builder, root, directory):
    return Container(builder, root, directory)


@pytest.fixture(scope="module")
def entrypoint(builder):
    return builder.configuration()["Entrypoint"]


@pytest.fixture
def pair():
    with pair_of() as made:
        yield made


def files(root):
    for place, _, names in os.walk(root):
        for name in names:
            path = Path(place, name)
            yield path, path.lstat()


class TestTheImage:
    def test_is_small(self, root):
        size = sum(status.st_size for _, status in files(root) if stat.S_ISREG(status.st_mode))
        print(f"\nthe image has {size / 1e6:.0f} MB")
        assert size < LARGEST_MB * 1e6

    def test_runs_as_nobody_unless_told_otherwise(self, builder):
        assert builder.configuration()["User"] == "65532:65532"

    def test_has_tidegate_as_its_only_way_in(self, builder):
        assert builder.configuration()["Entrypoint"] == ["/opt/tidegate/bin/tidegate"]

    def test_says_what_it_is(self, builder):
        labels = builder.configuration()["Labels"]
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        for label, field in (
            ("title", "name"),
            ("description", "description"),
            ("version", "version"),
            ("licenses", "license"),
        ):
            assert labels[f"org.opencontainers.image.{label}"] == project[field]

    def test_has_no_file_that_gives_rights(self, root):
        given = [
            path
            for path, status in files(root)
            if stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_ISUID | stat.S_ISGID)
        ]
        assert given == []
        assert not [
            path
            for path, status in files(root)
            if stat.S_ISREG(status.st_mode) and "security.capability" in os.listxattr(path)
        ]

    def test_has_nothing_that_compiles_or_fetches(self, root):
        programs = {path.name for path, _ in files(root) if "bin" in path.parent.name}
        assert not programs & set(COMPILERS)

    def test_has_the_classifier_and_the_cni_plugin(self, root):
        (package,) = root.glob("opt/tidegate/lib/python3*/site-packages/tidegate")
        assert (package / "bpf" / "classifier.bpf.o").stat().st_size > 0
        assert (package / "plugins" / "tidegate-cni").stat().st_mode & 0o111

    def test_finds_namespaces_also_by_the_path_that_containerd_says(self, root):
        assert (root / "var/run").readlink() in (Path("/run"), Path("../run"))

    def test_has_no_file_that_others_than_root_may_change(self, root):
        assert not [
            path
            for path, status in files(root)
            if stat.S_ISREG(status.st_mode) and (status.st_mode & 0o002 or status.st_uid != 0)
        ]


class TestWithoutRights:
    @pytest.mark.parametrize("command", ["", "agent", "init", "cni", "doctor"])
    def test_help_is_told(self, container, entrypoint, command):
        done = container.run(entrypoint, *([command] if command else []), "--help", user=65532)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: tidegate {command}".rstrip())

    def test_a_pod_is_not_redirected_and_the_reason_is_told(self, container, entrypoint, pair):
        done = container.run(entrypoint, "init", netns_path=pair.pod)
        assert done.returncode == Failure.PERMISSION
        assert "NET_ADMIN" in done.stderr
        assert "Traceback" not in done.stderr


class TestTheAgent:
    """With the rights of deploy/, and the default seccomp profile."""

    def test_redirects_and_observes_pods(self, deployed, pair):
        deployed.put("web", pair.pod)
        with deployed.running():
            web = deployed.settled()
            assert (web["redirect"], web["problem"]) == ("ok", "")
            assert web["observed_since"]
            assert Engine().check(pair.pod, DEFAULT) == ()
            with serving(pair.pod, "sidecar", [INBOUND]), serving(pair.pod, "app", [APP]):
                assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"

            # There is no API server here: an agent that is without one lives, and is ready.
            for probe in ("/healthz", "/readyz"):
                assert deployed.told(probe) is not None, probe
            assert deployed.run("status").returncode == 1
            examined = json.loads(deployed.run("doctor", "--json").stdout)
            missing = [
                one["name"] for one in examined["features"] if one["needed"] and not one["present"]
            ]
            assert missing == []
            wrong = [one["name"] for one in examined["findings"] if one["state"] == "wrong"]
            assert wrong == ["Kubernetes API"]

    def test_has_no_capability_that_it_could_do_without(self, deployed):
        """A pod whose processes are another user's, found by one of them, with the legacy tables."""
        for dropped in ("", *deployed.capabilities):
            with pair_of() as pair, process_in(pair.pod) as pid:
                deployed.put("web", f"/proc/{pid}/ns/net")
                granted = [one for one in deployed.capabilities if one != dropped]
                with deployed.running(granted, redirect={"backend": "iptables"}) as agent:
                    web = deployed.settled(agent)
                    assert (web["redirect"] == "ok") is (not dropped), (dropped, web)


class Deployed:
    """The agent as deploy/base has it, with directories of its own in the place of the node's."""

    def __init__(self, container, entrypoint, directory):
        text = (DEPLOY / "base" / "agent.yaml").read_text()
        self._pod = yaml.safe_load(text)["spec"]["template"]["spec"]
        (self._agent,) = self._pod["containers"]
        self._container, self._entrypoint = container, entrypoint
        self._mounts, self._read_only = {}, []
        for mount in self._agent["volumeMounts"]:
            where = mount["mountPath"]
            self._mounts[where] = directory / where.strip("/").replace("/", "-")
            self._mounts[where].mkdir()
            if mount.get("readOnly"):
                self._read_only.append(where)
        self.bpffs = self._mounts["/sys/fs/bpf"]
        self._mounts |= {where: Path(where) for where in ("/run/netns", "/sys/fs/cgroup")}
        self._run_dir = self._mounts["/run/tidegate"]
        (self._run_dir / "workloads").mkdir()
        capabilities = self._agent["securityContext"]["capabilities"]["add"]
        self.capabilities = tuple(f"CAP_{name}" for name in capabilities)

    def put(self, name, netns_path):
        workload = {
            "id": name,
            "name": name,
            "service": name,
            "node": "n1",
            "netns": netns_path,
            "meshed": True,
            "sidecar": "own",
            "port": APP,
        }
        (self._run_dir / "workloads" / f"{name}.json").write_text(json.dumps(workload))

    def running(self, capabilities=None, **settings):
        """The agent, with this in its configuration."""
        text = (DEPLOY / "base" / "configuration" / "agent.yaml").read_text()
        said = yaml.safe_load(text) | {"workloads": "/run/tidegate/workloads"} | settings
        (self._mounts["/etc/tidegate"] / "agent.yaml").write_text(yaml.safe_dump(said))
        how = self._how() | ({} if capabilities is None else {"capabilities": capabilities})
        return self._container.running(self._entrypoint, *self._agent["args"], **how)

    def run(self, *argv):
        """Another command of the image, as `kubectl exec` runs it."""
        return self._container.run(self._entrypoint, *argv, **self._how())

    def _how(self):
        return {
            "capabilities": self.capabilities,
            "environment": {"TIDEGATE_NODE": "n1", "TIDEGATE_NODE_ADDRESSES": "10.0.0.1"},
            "mounts": self._mounts,
            "read_only": self._read_only,
            "sees_processes": self._pod["hostPID"],
        }

    def told(self, path):
        """What the agent answers, None while it does not."""
        return told(self._run_dir / "agent.sock", path)

    def settled(self, process=None):
        """The only workload when it is redirected, or when it is said why not; nothing of it by an agent that ended."""
        deadline = time.monotonic() + 60
        while True:
            status = self.told("/v1/status")
            if status and (status["workloads"] or status["round_at"]):
                web = next(iter(status["workloads"]), {"redirect": "", "problem": status})
                if web["problem"] or (web["redirect"] == "ok" and web["observed_since"]):
                    return web
            if process is not None and process.poll() is not None:
                return {"redirect": "", "problem": process.communicate()}
            if time.monotonic() > deadline:
                return {"redirect": "", "problem": status}
            time.sleep(0.1)


@pytest.fixture
def deployed(container, entrypoint, tmp_path):
    made = Deployed(container, entrypoint, tmp_path)
    with mounted_bpffs(made.bpffs):
        yield made


@contextmanager
def process_in(netns_path):
    """Somebody's process in a namespace: its number."""
    argv = ["setpriv", "--reuid=1000", "--clear-groups", "sleep", "600"]
    with netns.spawn(netns_path, argv) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@contextmanager
def mounted_bpffs(directory):
    subprocess.run(["mount", "-t", "bpf", "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


class Asked(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("agent", timeout=60)
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def told(socket_path, path):
    """The agent's answer, None while there is none."""
    connection = Asked(socket_path)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return json.loads(answer.read()) if answer.status == HTTPStatus.OK else None
    except OSError:
        return None
    finally:
        connection.close()


class TestAnInitContainer:
    def test_redirects_its_pod_with_net_admin_alone(self, container, entrypoint, pair):
        for change in ("created", "unchanged"):
            done = container.run(
                entrypoint, "init", "--json", netns_path=pair.pod, capabilities=NET_ADMIN
            )
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert told["change"] == change
        passed = {probe["name"] for probe in told["probes"] if probe["outcome"] == "passed"}
        assert {"outbound-ipv4", "inbound-ipv4", "outbound-ipv6", "inbound-ipv6"} <= passed
        assert Engine().check(pair.pod, DEFAULT) == ()
        with serving(pair.pod, "sidecar", [INBOUND, OUTBOUND]), serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"
            assert landing(pair.pod, pair.peer_ipv6, APP, uid=1000).port == OUTBOUND

    def test_heeds_annotations_and_environment(self, container, entrypoint, pair, tmp_path):
        (tmp_path / "annotations").write_text('tidegate.io/exclude-inbound-ports="8080"\n')
        done = container.run(
            entrypoint,
            "init",
            netns_path=pair.pod,
            capabilities=NET_ADMIN,
            mounts={"/etc/podinfo": tmp_path},
            read_only=["/etc/podinfo"],
            environment={"TIDEGATE_DNS": "all"},
        )
        assert done.returncode == 0, done.stderr
        assert "passed: dns-udp-ipv4" in done.stdout
        with serving(pair.pod, "app", [APP]):
            assert landing(pair.peer, pair.pod_ipv4, APP).server == "app"
