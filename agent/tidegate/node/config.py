"""Configuration of one agent: a YAML file, checked as a whole before anything is touched."""

from pathlib import Path

import msgspec

from tidegate.errors import InputError
from tidegate.verdict.steps import Environment


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent needs to know. Durations are seconds."""

    node: str
    """Name of this node, unique in the mesh."""
    server: str
    """Intent server: unix:///path, or http://host:port of a Consul server."""
    workloads: Path
    """Directory of workload files, one JSON object (model.Workload) each."""
    node_addresses: tuple[str, ...] = ()
    """The node's own addresses: connections from them are probes."""
    run_dir: Path = Path("/run/tidegate")
    """Sidecar directories and pid files: gone after a reboot, as the sidecars are."""
    state_dir: Path = Path("/var/lib/tidegate")
    """Ledger and last known intent."""
    socket: Path = Path("/run/tidegate/agent.sock")
    bpffs: Path = Path("/sys/fs/bpf/tidegate")
    """Directory on a bpf file system below which maps, programs and links are pinned."""
    trust_domain: str
    datacenter: str = "dc1"
    window: float = 86400.0
    """Observation window of a verdict where a request names none."""
    leaf_lifetime: float = 3600.0
    environment: Environment = Environment.VM
    lab: str = ""
    """Name of the lab that this agent is part of, for the commands in its advice."""


def _decode_path(kind: type[object], text: object) -> object:
    if kind is Path and isinstance(text, str):
        return Path(text)
    raise TypeError(f"expected text, got {type(text).__name__}")


def load_config(path: Path) -> AgentConfig:
    """Reads an agent's configuration; raises InputError with file and field."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", source=str(path), expected="an agent configuration"
        ) from error
    try:
        config = msgspec.yaml.decode(text, type=AgentConfig, dec_hook=_decode_path)
    except msgspec.DecodeError as error:
        raise InputError(str(error), source=str(path)) from error
    if config.window <= 0 or config.leaf_lifetime <= 0:
        raise InputError(
            "a duration of zero or less", source=str(path), field="window, leaf_lifetime"
        )
    return config
