"""What a CNI call says, and how it is answered: the language between the plugin (init/cni) and the agent.

The plugin sends one request: MAGIC, the length of what follows (4 bytes, the highest first), the environment variables
of FIELDS, each ended by a zero byte, and the network configuration that it was given, without its prevResult. It gets
one JSON object: `done`, or `code`, `msg` and `details` of a CNI error, which it passes on. CNI's words are those of its
specification (github.com/containernetworking/cni, SPEC.md).
"""

import enum
import re
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from tidegate.errors import InputError
from tidegate.model import Sidecar

MAGIC: Final = b"TGC1"
"""What a request begins with; another number for another language."""

LENGTH_BYTES: Final = 4
MAX_REQUEST_BYTES: Final = 256 << 10
"""Of what follows the length: room for the attachments of some two thousand containers."""

FIELDS: Final = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")

DEFAULT_SOCKET: Final = Path("/run/tidegate/cni.sock")
ALWAYS_START: Final = ("kube-system", "tidegate-system")
"""Namespaces of what a cluster needs to come up, and of tidegate itself."""

CONSUL_CONFIG_ARGUMENT: Final = "CONSUL_IPTABLES_CONFIG"
"""In which of CNI_ARGS Nomad hands consul-cni what Kubernetes has in an annotation."""
_CONSUL_CONFIG: Final = "consul.hashicorp.com/redirect-traffic-config"

_LONGEST_SOCKET_PATH = 107
"""Bytes, without the closing 0 (linux/un.h, UNIX_PATH_MAX)."""

# As libcni checks them (pkg/utils/utils.go).
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,511}")
_INTERFACE = re.compile(r"(?!\.{1,2}$)[^\s/:]{1,15}")


class CniConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `cni` of an agent's configuration."""

    socket: Path = DEFAULT_SOCKET
    """Where the plugin finds the agent."""
    exclude_namespaces: tuple[str, ...] = ALWAYS_START
    """Kubernetes namespaces whose pods are left alone."""


def check(config: CniConfig, field: str = "socket") -> None:
    """InputError, with the field of this section, or what else it was said by, when the agent could not work by it."""
    if not config.socket.is_absolute():
        raise InputError(
            f"{str(config.socket)!r} depends on where the agent is started",
            field=field,
            expected="/...",
        )
    if len(bytes(config.socket)) > _LONGEST_SOCKET_PATH:
        raise InputError(
            f"{str(config.socket)!r} is too long for a unix socket",
            field=field,
            expected=f"at most {_LONGEST_SOCKET_PATH} bytes",
        )


class Command(enum.StrEnum):
    """What the agent can be asked; VERSION the plugin answers by itself."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    STATUS = "STATUS"
    GC = "GC"


class Code(enum.IntEnum):
    """Error codes; below 100 those of the specification."""

    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    DECODING = 6
    INVALID_CONFIG = 7
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    NOT_REDIRECTED = 100
    """The rules could not be put in place, or taken away."""
    DIFFERENT = 101
    """CHECK: the rules are not as they should be."""


class CniError(Exception):
    """How a call failed, in words for whoever reads the events of a pod."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        self.code = code
        self.message = message
        self.details = details
        super().__init__(f"{message}: {details}" if details else message)


class OnAgentAbsent(enum.StrEnum):
    """What becomes of a container that starts while nobody can say whether it is to be redirected."""

    FAIL = "fail"
    OPEN = "open"


class PluginConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands below `tidegate` in the plugin's entry of a network configuration.

    The first five are the plugin's own (init/cni), which takes one that is wrong as its default, and leaves it to the
    agent to refuse the call. The others say what Kubernetes says elsewhere.
    """

    socket: Annotated[str, msgspec.Meta(max_length=_LONGEST_SOCKET_PATH, pattern="^/[^\0]*$")] = (
        str(DEFAULT_SOCKET)
    )
    on_agent_absent: OnAgentAbsent = OnAgentAbsent.FAIL
    always_start: tuple[str, ...] = ALWAYS_START
    wait_s: Annotated[int, msgspec.Meta(ge=0, le=600)] = 3
    timeout_s: Annotated[int, msgspec.Meta(ge=0, le=600)] = 30
    mesh: bool = False
    """Whether the network's containers are redirected to a sidecar."""
    sidecar: Sidecar = Sidecar.TIDEGATE
    service: str | None = None
    """Service of all the network's containers; otherwise that of its name."""
    port: int | None = None
    annotations: dict[str, str] = {}


class AttachmentKey(NamedTuple):
    """What tells one attachment of a container to a network from all others."""

    network: str
    container_id: str
    interface: str


class _Valid(msgspec.Struct, frozen=True):
    container_id: str = msgspec.field(name="containerID")
    interface: str = msgspec.field(name="ifname")


class _Named(msgspec.Struct, frozen=True):
    """All that DEL reads of a network configuration: settings that are wrong keep no container from ending."""

    name: str = ""


class _Network(_Named, frozen=True):
    """What the agent reads of a network configuration."""

    plugin: PluginConfig = msgspec.field(name="tidegate", default=PluginConfig())
    valid: tuple[_Valid, ...] | None = msgspec.field(name="cni.dev/valid-attachments", default=None)
    attachments: tuple[_Valid, ...] | None = msgspec.field(name="cni.dev/attachments", default=None)


class CniRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the plugin."""

    command: Command
    key: AttachmentKey
    """Without container and interface where the command has none (STATUS, GC)."""
    netns: str
    """Path of the network namespace; empty where a DEL does not know it."""
    arguments: dict[str, str]
    """CNI_ARGS."""
    plugin: PluginConfig
    valid: frozenset[tuple[str, str]] | None
    """Container ids and interfaces of the attachments that GC leaves; None where it does not say."""

    @property
    def pod_namespace(self) -> str:
        return self.arguments.get("K8S_POD_NAMESPACE", "")

    @property
    def pod_name(self) -> str:
        return self.arguments.get("K8S_POD_NAME", "")

    @property
    def pod_uid(self) -> str:
        return self.arguments.get("K8S_POD_UID", "")

    @property
    def shown(self) -> str:
        """What a person calls the container."""
        if not self.pod_name:
            return f"container {self.key.container_id[:12]}"
        return f"{self.pod_namespace}/{self.pod_name}" if self.pod_namespace else self.pod_name

    @property
    def annotations(self) -> dict[str, str]:
        """What the call itself says of the redirection: the network's annotations, and Nomad's argument."""
        argument = self.arguments.get(CONSUL_CONFIG_ARGUMENT)
        consul = {_CONSUL_CONFIG: argument} if argument else {}
        return {**self.plugin.annotations, **consul}

    @property
    def is_consuls(self) -> bool:
        """Whether Nomad says what consul-cni would have to do."""
        return bool(self.arguments.get(CONSUL_CONFIG_ARGUMENT))


def parse(body: bytes) -> CniRequest:
    """The request in what follows the length. CniError names what is wrong with it."""
    *raw, configuration = body.split(b"\0", len(FIELDS))
    if len(raw) != len(FIELDS):
        raise CniError(Code.DECODING, "the plugin's request is incomplete")
    fields = {
        name: value.decode(errors="surrogateescape")
        for name, value in zip(FIELDS, raw, strict=True)
    }
    try:
        command = Command(fields["CNI_COMMAND"])
    except ValueError as error:
        raise _invalid("CNI_COMMAND", f"one of {', '.join(Command)}") from error
    network = _network(command, configuration)
    key = AttachmentKey(network.name, fields["CNI_CONTAINERID"], fields["CNI_IFNAME"])
    _check_environment(command, key, fields["CNI_NETNS"])
    attachments = network.attachments if network.valid is None else network.valid
    return CniRequest(
        command=command,
        key=key,
        netns=fields["CNI_NETNS"],
        arguments=_arguments(fields["CNI_ARGS"]),
        plugin=network.plugin,
        valid=None
        if attachments is None
        else frozenset((one.container_id, one.interface) for one in attachments),
    )


def done() -> bytes:
    """The answer to a call that was carried out."""
    return b'{"done":true}'


def failed(error: CniError) -> bytes:
    """The answer to a call that was not."""
    answer: dict[str, int | str] = {"code": int(error.code), "msg": _encodable(error.message)}
    if error.details:
        answer["details"] = _encodable(error.details)
    return msgspec.json.encode(answer)


def _encodable(text: str) -> str:
    """Without what came out of an environment that is no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _network(command: Command, configuration: bytes) -> _Network:
    try:
        if command is Command.DEL:
            return _Network(name=msgspec.json.decode(configuration, type=_Named).name)
        return msgspec.json.decode(configuration, type=_Network)
    except msgspec.ValidationError as error:
        problem = str(error).replace("`$.", "`")
        raise CniError(
            Code.INVALID_CONFIG, "the plugin's network configuration is wrong", problem
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CniError(
            Code.DECODING, "the plugin's network configuration is not JSON", str(error)
        ) from error


def _check_environment(command: Command, key: AttachmentKey, netns: str) -> None:
    if not _ID.fullmatch(key.network):
        problem = f"name: {key.network!r} is not the name of a network"
        raise CniError(Code.INVALID_CONFIG, "the plugin's network configuration is wrong", problem)
    match command:
        case Command.STATUS | Command.GC:
            return
        case Command.ADD | Command.CHECK:
            if not netns.startswith("/"):
                raise _invalid("CNI_NETNS", "the path of a network namespace")
        case Command.DEL:
            pass
    if not _ID.fullmatch(key.container_id):
        raise _invalid("CNI_CONTAINERID", "letters, digits, '_', '.' and '-'")
    if not _INTERFACE.fullmatch(key.interface):
        raise _invalid("CNI_IFNAME", "the name of a network interface")


def _invalid(variable: str, expected: str) -> CniError:
    return CniError(
        Code.INVALID_ENVIRONMENT, f"{variable} is missing or wrong", f"expected {expected}"
    )


def _arguments(text: str) -> dict[str, str]:
    """CNI_ARGS, such as K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0; what is no pair says nothing."""
    pairs = (item.partition("=") for item in text.split(";"))
    return {name: value for name, separator, value in pairs if separator}
