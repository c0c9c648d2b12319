"""Puts the CNI plugin on a node and into its network configuration, and keeps it there.

The configuration is the one that the container runtime takes: the first usable file of its directory, in the order of
names (libcni's ConfFiles). tidegate's entry is the last of that file's chain; a single plugin's file becomes a chain.
What was there before is kept beside it, under a name that runtimes don't read, so that it can come back byte for byte.
A link is replaced by a file, and comes back as a link. All files are replaced by rename, the plugin before it is named
and after it was, and several installers do not disturb each other. Nothing is taken away but by `uninstall`: whoever
stops or replaces the agent must not let containers start outside the mesh.
"""

import contextlib
import enum
import json
import os
import secrets
import select
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

import tidegate
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.kernel.inotify import Watch
from tidegate.node.log import Log
from tidegate.workloads.cni import ALWAYS_START, DEFAULT_SOCKET, OnAgentAbsent

PLUGIN: Final = "tidegate-cni"
CONSUL_PLUGIN: Final = "consul-cni"
DEFAULT_CONF_DIR: Final = Path("/etc/cni/net.d")
DEFAULT_BIN_DIR: Final = Path("/opt/cni/bin")
VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Of the CNI specification: those of init/cni. Before 0.3.0 there are no chains."""
CHAIN_VERSION: Final = "0.3.1"
"""Of a chain that is made of a plugin whose version has none."""

SAVED: Final = ".tidegate-saved"
_NEW: Final = ".tidegate-new"
_SUFFIXES: Final = (".conf", ".conflist", ".json")
_MAX_BYTES: Final = 4 << 20
_PROGRAM_MODE: Final = 0o755
_TRIES: Final = 5
_REPLACES: Final = "replaces"
"""Field of the plugin's entry: what was taken out of the chain for it, and comes back when it goes."""

LOOK_S = 10.0
"""How often it is looked at what is there, whatever the kernel tells."""
CHANGES, CHANGES_S = 3, 10.0
"""So many changes in such a time are made at once. Who else wants to be last would otherwise be fought without end."""

log = Log("cni")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be installed where."""

    conf_dir: Path = DEFAULT_CONF_DIR
    bin_dir: Path = DEFAULT_BIN_DIR
    chain: bool = True
    """Whether the plugin is put into the network configuration; otherwise it only lies there, for multus."""
    replace_consul: bool = False
    """Whether Consul's plugin is taken out of the chain: tidegate's does the same for its pods."""
    socket: Path = DEFAULT_SOCKET
    on_agent_absent: OnAgentAbsent = OnAgentAbsent.FAIL
    always_start: tuple[str, ...] = ALWAYS_START

    @property
    def entry(self) -> dict[str, Any]:
        """The plugin's entry of a chain."""
        return self.entry_instead_of({})

    def entry_instead_of(self, there: dict[str, Any]) -> dict[str, Any]:
        """The plugin's entry with what somebody else has said in the one that is there, such as `mesh`."""
        section = there.get("tidegate")
        return {
            **there,
            "type": PLUGIN,
            "tidegate": {
                **(section if isinstance(section, dict) else {}),
                "socket": str(self.socket),
                "on_agent_absent": self.on_agent_absent.value,
                "always_start": list(self.always_start),
            },
        }


class Chained(enum.StrEnum):
    """Where the plugin stands in the network configuration."""

    LAST = "last"
    NOT_LAST = "not-last"
    """In the chain, in front of others."""
    OTHER = "other"
    """In the chain with other settings, or more than once."""
    MISSING = "missing"
    NO_CHAIN = "no-chain"
    """There is no network configuration that could have it."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is installed."""

    plugin: Path
    plugin_is_there: bool
    plugin_is_ours: bool
    """Whether it is the one of this version."""
    configuration: Path | None
    """The file that runtimes take; None when there is none."""
    chained: Chained
    consul: bool
    """Whether Consul's plugin is in that chain as well."""
    problems: tuple[str, ...]


class _Found(msgspec.Struct, frozen=True):
    """The file that runtimes take."""

    path: Path
    document: dict[str, Any]
    identity: tuple[int, int, int, int]
    """To tell whether it was replaced or written since it was read."""

    @property
    def is_chain(self) -> bool:
        return self.path.suffix == ".conflist"

    @property
    def plugins(self) -> list[dict[str, Any]]:
        plugins: list[dict[str, Any]] = self.document["plugins"] if self.is_chain else []
        return plugins


def packaged_plugin() -> Path:
    """The plugin of this version. TidegateError when the package was made without."""
    path = Path(tidegate.__file__).with_name("plugins") / PLUGIN
    if not path.is_file():
        raise TidegateError(f"{path} is missing: it is made by `make -C init/cni`")
    return path


def look(settings: Settings) -> State:
    """What is there. TidegateError when that cannot be seen."""
    plugin = settings.bin_dir / PLUGIN
    try:
        installed = _content(plugin)
    except OSError as error:
        raise TidegateError(f"{plugin} cannot be read: {error.strerror}") from error
    found, problems = _first_usable(settings.conf_dir)
    consul = found is not None and any(map(_is_consul, found.plugins))
    if consul:
        problems += (f"{CONSUL_PLUGIN} is in the chain as well; see --replace-consul-cni",)
    return State(
        plugin=plugin,
        plugin_is_there=installed is not None,
        plugin_is_ours=installed == packaged_plugin().read_bytes(),
        configuration=found.path if found else None,
        chained=_chained(found, settings),
        consul=consul,
        problems=problems,
    )


def install(settings: Settings) -> State:
    """Makes what is missing, once. TidegateError says what could not be made."""
    _install_plugin(settings.bin_dir)
    if settings.chain:
        for _ in range(_TRIES):
            found, _problems = _first_usable(settings.conf_dir)
            if found is None or _put_in(found, settings):
                break
        else:
            raise TidegateError(f"what is in {settings.conf_dir} changes all the time")
    return look(settings)


def is_as_wanted(state: State, settings: Settings) -> bool:
    """Whether `install` has nothing to do."""
    chained = not settings.chain or state.chained is Chained.LAST
    return state.plugin_is_ours and chained and not (state.consul and settings.replace_consul)


class Upkeep:
    """Installs, and installs again what somebody took away, until told to stop; takes nothing away itself."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._told: object = None
        self._changed: list[float] = []
        self._watch: Watch | None = None
        self._refusal = ""

    def run(self, stop: int) -> None:
        """Until the descriptor `stop` is readable."""
        try:
            while not _is_readable(stop):
                self._cover()
                self.step()
                if self._watch is None:
                    select.select((stop,), (), (), self._pause_s())
                else:
                    self._watch.wait(self._pause_s(), stop)
        finally:
            if self._watch is not None:
                self._watch.close()

    def _cover(self) -> None:
        """Has the kernel tell of changes. Where it refuses (fs.inotify has limits), they are seen at the next look."""
        try:
            self._watch = self._watch or Watch()
            for directory in (self._settings.conf_dir, self._settings.bin_dir):
                self._watch.cover(directory)
        except KernelError as error:
            if str(error) != self._refusal:
                self._refusal = str(error)
                log.warning(f"changes are noticed only within {LOOK_S:.0f} s", reason=self._refusal)

    def step(self) -> None:
        """Looks, and installs what is missing, unless that was just done too often."""
        try:
            before = look(self._settings)
            if is_as_wanted(before, self._settings):
                self._tell(before)
                return
            if self._pause_s() < LOOK_S:
                return
            if before.chained is not Chained.NO_CHAIN or not before.plugin_is_ours:
                self._changed.append(time.monotonic())
            after = install(self._settings)
            if is_as_wanted(after, self._settings):
                log.info(
                    "installed", plugin=str(after.plugin), configuration=str(after.configuration)
                )
            self._tell(after)
        except TidegateError as error:
            self._tell(str(error))

    def _pause_s(self) -> float:
        """How long to wait before the next look: for a while nothing is changed that was changed often just now."""
        now = time.monotonic()
        self._changed = [at for at in self._changed if now - at < CHANGES_S]
        if len(self._changed) < CHANGES:
            return LOOK_S
        return max(CHANGES_S - (now - self._changed[0]), 0.1)

    def _tell(self, what: State | str) -> None:
        if what == self._told:
            return
        self._told = what
        if isinstance(what, str):
            log.warning("the plugin cannot be installed; it is tried again", reason=what)
            return
        for problem in what.problems:
            log.warning(problem)
        if what.chained is Chained.NO_CHAIN and self._settings.chain:
            directory = str(self._settings.conf_dir)
            log.warning(
                "there is no network configuration yet; waiting for one", directory=directory
            )


def uninstall(conf_dir: Path, bin_dir: Path) -> tuple[str, ...]:
    """Takes the plugin out of all configurations, brings back what was there before, then removes the plugin.

    What was done, one sentence each; () when nothing was there. TidegateError when something could not be done.
    """
    done = []
    for path in _files(conf_dir):
        if path.suffix == ".conflist" and (sentence := _take_out(path)):
            done.append(sentence)
    with _refusals_told(conf_dir):
        for left in _left_behind(conf_dir):
            left.unlink()
    plugin = bin_dir / PLUGIN
    with _refusals_told(plugin):
        if plugin.is_file():
            plugin.unlink()
            done.append(f"{plugin} is removed")
    return tuple(done)


def traces(conf_dir: Path, bin_dir: Path) -> tuple[Path, ...]:
    """The files that `uninstall` would change or remove. TidegateError when that cannot be seen."""
    chains = (path for path in _files(conf_dir) if path.suffix == ".conflist")
    named = [
        path for path in chains if (found := _read(path)[0]) and any(map(_is_ours, found.plugins))
    ]
    plugin = bin_dir / PLUGIN
    return (*named, *_left_behind(conf_dir), *((plugin,) if plugin.is_file() else ()))


def _left_behind(conf_dir: Path) -> list[Path]:
    """What runtimes do not read: what was saved, and what an installer that was killed was writing."""
    return sorted((*conf_dir.glob(f"*{SAVED}"), *conf_dir.glob(f".*{_NEW}")))


def _chained(found: _Found | None, settings: Settings) -> Chained:
    if found is None:
        return Chained.NO_CHAIN
    ours = [plugin for plugin in found.plugins if _is_ours(plugin)]
    if not ours:
        return Chained.MISSING
    if ours != [settings.entry_instead_of(ours[-1])]:
        return Chained.OTHER
    return Chained.LAST if _is_ours(found.plugins[-1]) else Chained.NOT_LAST


def _install_plugin(bin_dir: Path) -> None:
    plugin = bin_dir / PLUGIN
    content = packaged_plugin().read_bytes()
    with _refusals_told(plugin, "--bin-dir names where the runtime looks for plugins"):
        bin_dir.mkdir(parents=True, exist_ok=True)
        if _content(plugin) != content:
            _replace(plugin, content)


def _put_in(found: _Found, settings: Settings) -> bool:
    """Whether the file has the plugin as the last of its chain now; False when somebody changed it meanwhile."""
    document = _with_entry(found, settings)
    if document == found.document:
        return True
    path = found.path.with_suffix(".conflist")
    with (
        _refusals_told(path, "--conf-dir names where the runtime looks for network configurations"),
        contextlib.suppress(FileNotFoundError),
    ):
        for before in {found.path, path}:
            if before.is_file():
                _save(before)
        if not _replace(
            path, _text(document), like=found.path, only_if=lambda: _is_unchanged(found)
        ):
            return False
        if not found.is_chain:
            # Only after the chain is there: runtimes take this one as long as it lies in front.
            found.path.unlink()
        return True
    return False


def _with_entry(found: _Found, settings: Settings) -> dict[str, Any]:
    if not found.is_chain:
        single = found.document
        version = single.get("cniVersion")
        return {
            "cniVersion": version if version in VERSIONS else CHAIN_VERSION,
            "name": single.get("name", "network"),
            "plugins": [
                {key: value for key, value in single.items() if key not in ("cniVersion", "name")},
                settings.entry,
            ],
        }
    kept = [
        plugin
        for plugin in found.plugins
        if not _is_ours(plugin) and not (settings.replace_consul and _is_consul(plugin))
    ]
    ours = [plugin for plugin in found.plugins if _is_ours(plugin)]
    entry = settings.entry_instead_of(ours[-1] if ours else {})
    if settings.replace_consul and any(map(_is_consul, found.plugins)):
        entry[_REPLACES] = CONSUL_PLUGIN
    return {**found.document, "plugins": [*kept, entry]}


def _take_out(path: Path) -> str:
    """What was done; empty when the file does not have the plugin."""
    found, _problem = _read(path)
    if found is None or not any(map(_is_ours, found.plugins)):
        return ""
    kept = [plugin for plugin in found.plugins if not _is_ours(plugin)]
    replaced = [plugin.get(_REPLACES) for plugin in found.plugins if _is_ours(plugin)]
    with _refusals_told(path):
        for before in _saved_of(path):
            saved = _saved(before)
            original, _problem = _read_as(saved, before)
            if original is None or any(map(_is_ours, original.plugins)):
                continue
            if saved.is_symlink() or _others(original, replaced) == _others(found, replaced):
                saved.rename(before)
                if before != path:
                    _bring_back_or_remove(path)
                return f"{before} is as it was before"
            there = {plugin["type"] for plugin in kept}
            kept += (
                one
                for one in original.plugins
                if one["type"] in replaced and one["type"] not in there
            )
        if not kept:
            return f"{path} names no plugin but {PLUGIN}: it is left as it is"
        _replace(path, _text({**found.document, "plugins": kept}), like=path)
    return f"{path} does not name {PLUGIN} any more"


def _saved(path: Path) -> Path:
    return path.with_name(path.name + SAVED)


def _saved_of(path: Path) -> Iterator[Path]:
    """The files that this one may have been made of."""
    for suffix in (".conflist", ".conf", ".json"):
        before = path.with_suffix(suffix)
        if _saved(before).is_file():
            yield before


def _save(path: Path) -> None:
    """Keeps a file that does not have the plugin as it is, and a link as a link."""
    if path.is_symlink():
        temporary = _temporary(path)
        temporary.symlink_to(path.readlink())
        temporary.rename(_saved(path))
        return
    identity, content = _identity(path), path.read_bytes()
    found, _problem = _parsed(content, path, identity)
    if found is None or not any(map(_is_ours, found.plugins)):
        _replace(_saved(path), content, like=path)


def _bring_back_or_remove(path: Path) -> None:
    """A chain that was put in the place of another file: what it overwrote, if anything."""
    if _saved(path).is_file():
        _saved(path).rename(path)
    else:
        path.unlink()


def _others(found: _Found, replaced: list[Any]) -> list[dict[str, Any]]:
    """The plugins that have nothing to do with tidegate's, as a chain has them."""
    if found.is_chain:
        return [one for one in found.plugins if not _is_ours(one) and one["type"] not in replaced]
    return [
        {key: value for key, value in found.document.items() if key not in ("cniVersion", "name")}
    ]


def _is_ours(plugin: dict[str, Any]) -> bool:
    return plugin.get("type") == PLUGIN


def _is_consul(plugin: dict[str, Any]) -> bool:
    return plugin.get("type") == CONSUL_PLUGIN


def _files(conf_dir: Path) -> list[Path]:
    """The files that runtimes look at, in their order."""
    try:
        found = sorted(conf_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TidegateError(f"{conf_dir} cannot be read: {error.strerror}") from error
    return [path for path in found if path.suffix in _SUFFIXES]


def _first_usable(conf_dir: Path) -> tuple[_Found | None, tuple[str, ...]]:
    """The file that runtimes take, and what is wrong with those in front of it, or with it as a chain."""
    problems: list[str] = []
    for path in _files(conf_dir):
        found, problem = _read(path)
        if found is None:
            problems.append(f"{path} is not used: {problem}")
            continue
        strange = [one for one in _versions_of(found.document) if one not in VERSIONS]
        if found.is_chain and strange:
            told = ", ".join("none" if one is None else str(one) for one in strange)
            problem = f"{path} is of a version of CNI that {PLUGIN} does not speak ({told})"
            problems.append(f"{problem}; it is left alone")
            return None, tuple(problems)
        return found, tuple(problems)
    return None, tuple(problems)


def _versions_of(document: dict[str, Any]) -> list[Any]:
    """Those of which a runtime takes one."""
    more = document.get("cniVersions")
    return [document.get("cniVersion"), *(more if isinstance(more, list) else ())]


def _read(path: Path) -> tuple[_Found | None, str]:
    return _read_as(path, path)


def _read_as(file: Path, path: Path) -> tuple[_Found | None, str]:
    """The content of a file, as if it lay at `path`; or what is wrong with it."""
    try:
        identity, content = _identity(file), _content(file) or b""
    except OSError as error:
        return None, error.strerror or str(error)
    return _parsed(content, path, identity)


def _parsed(
    content: bytes, path: Path, identity: tuple[int, int, int, int]
) -> tuple[_Found | None, str]:
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, str(error)
    found = _Found(path, document, identity)
    if not isinstance(document, dict):
        return None, "it is not a JSON object"
    plugins = document.get("plugins") if found.is_chain else [document]
    if not isinstance(plugins, list) or not plugins:
        return None, "it has no plugins"
    if not all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in plugins):
        return None, "a plugin has no type"
    if found.is_chain and not isinstance(document.get("name"), str):
        return None, "it has no name"
    return found, ""


def _identity(path: Path) -> tuple[int, int, int, int]:
    there = path.stat()
    return there.st_dev, there.st_ino, there.st_mtime_ns, there.st_size


def _is_unchanged(found: _Found) -> bool:
    try:
        return _identity(found.path) == found.identity
    except FileNotFoundError:
        return False


def _content(path: Path) -> bytes | None:
    """None where there is no such file."""
    try:
        # A pipe that nobody writes to is empty, and not waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            return stream.read(_MAX_BYTES)
    except FileNotFoundError:
        return None


def _text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _temporary(path: Path) -> Path:
    """A name beside a file that no other installer takes, such as that of the version before."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_NEW}")


def _replace(
    path: Path,
    content: bytes,
    *,
    like: Path | None = None,
    only_if: Callable[[], bool] = lambda: True,
) -> bool:
    """By rename, and on the disk before that: after a crash there is the old file or the new one.

    With owner and mode of the file `like`; without one as a program. `only_if` is asked right before the rename, which
    is not done without. Whether it was.
    """
    temporary = _temporary(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            if like is None:
                os.fchmod(descriptor, _PROGRAM_MODE)
            else:
                there = like.stat()
                os.fchmod(descriptor, stat.S_IMODE(there.st_mode))
                os.fchown(descriptor, there.st_uid, there.st_gid)
            stream.flush()
            os.fsync(descriptor)
        replaced = only_if()
        if replaced:
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return replaced


def _is_readable(descriptor: int) -> bool:
    return bool(select.select((descriptor,), (), (), 0)[0])


@contextlib.contextmanager
def _refusals_told(path: Path, hint: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        more = f"; {hint}" if hint else ""
        raise TidegateError(f"{path} cannot be changed: {error.strerror}{more}") from error
