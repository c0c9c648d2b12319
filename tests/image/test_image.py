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
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from building import REPOSITORY, Builder, Container
from namespaces import landing, pair_of, serving

from tidegate.enforce.redirect.engine import Engine
from tidegate.intent.policy import DEFAULT
from tidegate.node.init import Failure

pytestmark = pytest.mark.timeout(1800)

DEPLOY = REPOSITORY / "deploy"
LARGEST_MB = 240
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

    def test_redirects_and_observes_pods(self, container, entrypoint, pair, tmp_path):
        pod = yaml.safe_load((DEPLOY / "base" / "agent.yaml").read_text())["spec"]["template"][
            "spec"
        ]
        (agent,) = pod["containers"]
        mounts, read_only = {}, []
        for mount in agent["volumeMounts"]:
            where = mount["mountPath"]
            mounts[where] = tmp_path / where.strip("/").replace("/", "-")
            mounts[where].mkdir()
            if mount.get("readOnly"):
                read_only.append(where)
        mounts["/run/netns"], mounts["/sys/fs/cgroup"] = Path("/run/netns"), Path("/sys/fs/cgroup")
        configuration = mounts["/etc/tidegate"] / "agent.yaml"
        text = (DEPLOY / "base" / "configuration" / "agent.yaml").read_text()
        configuration.write_text(text + "workloads: /run/tidegate/workloads\n")
        workloads = mounts["/run/tidegate"] / "workloads"
        workloads.mkdir()
        (workloads / "web.json").write_text(
            json.dumps(
                {
                    "id": "web-1",
                    "name": "web-1",
                    "service": "web",
                    "node": "n1",
                    "netns": pair.pod,
                    "meshed": True,
                    "sidecar": "own",
                    "port": APP,
                }
            )
        )
        with (
            mounted_bpffs(mounts["/sys/fs/bpf"]),
            container.running(
                entrypoint,
                *agent["args"],
                capabilities=[
                    f"CAP_{name}" for name in agent["securityContext"]["capabilities"]["add"]
                ],
                environment={"TIDEGATE_NODE": "n1", "TIDEGATE_NODE_ADDRESSES": pair.peer_ipv4},
                mounts=mounts,
                read_only=read_only,
                sees_processes=pod["hostPID"],
            ) as process,
        ):
            status = None
            deadline = time.monotonic() + 60
            while not (status and status["workloads"] and status["workloads"][0]["observed_since"]):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"{status}\n{process.communicate()}")
                time.sleep(0.1)
                status = told(mounts["/run/tidegate"] / "agent.sock")
            (web,) = status["workloads"]
            assert (web["redirect"], web["problem"]) == ("ok", "")
            assert Engine().check(pair.pod, DEFAULT) == ()
            with serving(pair.pod, "sidecar", [INBOUND]), serving(pair.pod, "app", [APP]):
                assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"


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


def told(path):
    """What the agent says of itself, None while it does not."""
    connection = Asked(path)
    try:
        connection.request("GET", "/v1/status")
        return json.loads(connection.getresponse().read())
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
