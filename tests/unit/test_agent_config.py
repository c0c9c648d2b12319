"""The agent's configuration file: what is good, and one sentence with file and field for what is not."""

from pathlib import Path

import pytest
import yaml

from tidegate.errors import InputError
from tidegate.node.config import AgentConfig, load_config
from tidegate.verdict.steps import Environment

GOOD = {
    "node": "node1",
    "server": "unix:///run/tidegate/server.sock",
    "workloads": "/run/tidegate/workloads",
    "trust_domain": "1a2b.consul",
}


@pytest.fixture
def load(tmp_path):
    def load_one(content) -> AgentConfig:
        path = tmp_path / "agent.yaml"
        raw = content if isinstance(content, bytes) else yaml.safe_dump(content).encode()
        path.write_bytes(raw)
        return load_config(path)

    return load_one


def fault(load, content) -> InputError:
    """The one sentence: names the file, has no second line."""
    with pytest.raises(InputError) as caught:
        load(content)
    assert "agent.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return caught.value


def test_what_is_not_said_has_the_documented_defaults(load):
    config = load(GOOD)
    assert config.node == "node1"
    assert config.workloads == Path("/run/tidegate/workloads")
    assert config.socket == Path("/run/tidegate/agent.sock")
    assert config.window == 86400.0
    assert config.environment is Environment.VM


def test_all_fields_are_read(load):
    config = load(
        GOOD
        | {
            "node_addresses": ["10.0.0.1", "fd00::1"],
            "run_dir": "/run/a",
            "state_dir": "/var/a",
            "socket": "/run/a/s",
            "bpffs": "/sys/fs/bpf/a",
            "datacenter": "dc2",
            "window": 8,
            "leaf_lifetime": 60.5,
            "environment": "lab",
            "lab": "demo",
            "server": "http://127.0.0.1:8500",
        }
    )
    assert (config.window, config.leaf_lifetime, config.lab) == (8.0, 60.5, "demo")
    assert config.node_addresses == ("10.0.0.1", "fd00::1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nod", "x"),
        ("node", 7),
        ("node", ""),
        ("node", "Node_1"),
        ("node", "../../etc"),
        ("server", "localhost:8500"),
        ("server", "unix://relative"),
        ("workloads", ["/a"]),
        ("workloads", "here"),
        ("node_addresses", "10.0.0.1"),
        ("node_addresses", ["10.0.0.256"]),
        ("run_dir", "run"),
        ("state_dir", ""),
        ("socket", "/" + "s" * 107),
        ("socket", "agent.sock"),
        ("bpffs", "pins"),
        ("trust_domain", "Mesh"),
        ("datacenter", "dc_1"),
        ("environment", "cloud"),
        ("window", 0),
        ("window", -1.5),
        ("window", "24h"),
        ("window", float("nan")),
        ("window", float("inf")),
        ("leaf_lifetime", 0),
        ("leaf_lifetime", float("nan")),
    ],
)
def test_a_wrong_field_is_named(load, field, value):
    assert field in str(fault(load, GOOD | {field: value}))


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_named(load, field):
    assert field in str(fault(load, {key: value for key, value in GOOD.items() if key != field}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a\n- b\n",
        b"node: [",
        b"a: b: c\n\td",
        b"\xff\xfe\x00x",
        b"node: \x01",
        b"just words",
    ],
)
def test_what_is_no_configuration_at_all_is_one_sentence(load, content):
    fault(load, content)


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=why) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
