"""The CNI plugin's installer: atomic, last in the chain, kept there, and gone without a trace."""

import errno
import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tidegate.cli.main import main
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.node import cni_install
from tidegate.node.cni_install import PLUGIN, Chained, Settings, Upkeep, packaged_plugin

DEADLINE_S = 20.0
CHAIN = b'{"cniVersion": "1.0.0",\n "name":"pods", "disableCheck": true, "plugins":[{"type":"bridge","mtu":1450}]}\n'
SINGLE = b'{"cniVersion":"0.3.1","name":"pods","type":"ptp","ipam":{"type":"host-local"}}'
CONSUL = {"type": "consul-cni", "log_level": "info"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(conf_dir=tmp_path / "net.d", bin_dir=tmp_path / "bin")
    made.conf_dir.mkdir()
    return made


def plugins(path: Path) -> list[str]:
    return [plugin["type"] for plugin in json.loads(path.read_bytes())["plugins"]]


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def uninstall(settings: Settings) -> tuple[str, ...]:
    return cni_install.uninstall(settings.conf_dir, settings.bin_dir)


def test_the_plugin_becomes_the_last_of_the_chain_and_the_rest_stays(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    state = cni_install.install(settings)
    assert (state.chained, state.configuration) == (Chained.LAST, path)
    document = json.loads(path.read_bytes())
    assert document["plugins"] == [{"type": "bridge", "mtu": 1450}, settings.entry]
    assert {**document, "plugins": 0} == {**json.loads(CHAIN), "plugins": 0}
    plugin = settings.bin_dir / PLUGIN
    assert plugin.read_bytes() == packaged_plugin().read_bytes()
    assert stat.S_IMODE(plugin.stat().st_mode) == 0o755


def test_uninstall_brings_back_what_was_there_byte_for_byte(settings: Settings) -> None:
    (settings.conf_dir / "10-pods.conflist").write_bytes(CHAIN)
    (settings.conf_dir / "20-other.conf").write_bytes(SINGLE)
    before = listing(settings.conf_dir)
    cni_install.install(settings)
    cni_install.install(settings)
    assert len(uninstall(settings)) == 2
    assert listing(settings.conf_dir) == before
    assert listing(settings.bin_dir) == {}
    assert uninstall(settings) == ()


def test_a_single_plugin_becomes_a_chain_and_a_single_plugin_again(settings: Settings) -> None:
    single = settings.conf_dir / "10-pods.conf"
    single.write_bytes(SINGLE)
    single.chmod(0o600)
    cni_install.install(settings)
    assert not single.exists()
    chain = settings.conf_dir / "10-pods.conflist"
    assert json.loads(chain.read_bytes()) == {
        "cniVersion": "0.3.1",
        "name": "pods",
        "plugins": [{"type": "ptp", "ipam": {"type": "host-local"}}, settings.entry],
    }
    assert stat.S_IMODE(chain.stat().st_mode) == 0o600
    uninstall(settings)
    assert listing(settings.conf_dir) == {"10-pods.conf": SINGLE}
    assert stat.S_IMODE(single.stat().st_mode) == 0o600


def test_a_change_by_others_survives_uninstall(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    cni_install.install(settings)
    document = json.loads(path.read_bytes())
    document["plugins"].insert(1, {"type": "portmap"})
    path.write_text(json.dumps(document))
    uninstall(settings)
    assert plugins(path) == ["bridge", "portmap"]
    assert [*listing(settings.conf_dir)] == ["10-pods.conflist"]


def test_the_first_usable_file_is_the_one_as_runtimes_choose_it(settings: Settings) -> None:
    for name, content in (
        ("00-empty.conflist", b""),
        ("01-truncated.conflist", CHAIN[:40]),
        ("02-no-plugins.conflist", b'{"name":"x","cniVersion":"1.0.0","plugins":[]}'),
        ("03-no-type.conf", b'{"name":"x","cniVersion":"1.0.0"}'),
        ("04-other.txt", CHAIN),
        ("05-a-list.json", b"[]"),
        ("06-hidden.conflist.bak", CHAIN),
        ("10-pods.conflist", CHAIN),
        ("20-pods.conflist", CHAIN),
    ):
        (settings.conf_dir / name).write_bytes(content)
    state = cni_install.install(settings)
    assert state.configuration == settings.conf_dir / "10-pods.conflist"
    assert plugins(settings.conf_dir / "20-pods.conflist") == ["bridge"]
    assert [problem.split(" ")[0].rsplit("/")[-1] for problem in state.problems] == [
        "00-empty.conflist",
        "01-truncated.conflist",
        "02-no-plugins.conflist",
        "03-no-type.conf",
        "05-a-list.json",
    ]


@pytest.mark.parametrize(
    "said", [{}, {"cniVersion": "0.2.0"}, {"cniVersions": ["1.1.0", "2.0.0"]}, {"cniVersion": []}]
)
def test_a_chain_that_the_plugin_would_break_is_left_alone(
    settings: Settings, said: dict[str, object]
) -> None:
    document = {**json.loads(CHAIN), **said}
    if not said:
        del document["cniVersion"]
    path = settings.conf_dir / "10-pods.conflist"
    path.write_text(json.dumps(document))
    state = cni_install.install(settings)
    assert state.chained is Chained.NO_CHAIN
    assert "does not speak" in state.problems[0]
    assert plugins(path) == ["bridge"]


def test_a_link_comes_back_as_a_link(settings: Settings, tmp_path: Path) -> None:
    target = tmp_path / "pods.conflist"
    target.write_bytes(CHAIN)
    path = settings.conf_dir / "10-pods.conflist"
    path.symlink_to("../pods.conflist")
    cni_install.install(settings)
    assert plugins(path) == ["bridge", PLUGIN]
    newer = CHAIN.replace(b"1450", b"9000")
    target.write_bytes(newer)
    uninstall(settings)
    assert path.readlink() == Path("../pods.conflist")
    assert listing(settings.conf_dir) == {"10-pods.conflist": newer}


def test_a_link_to_a_chain_that_names_the_plugin_does_not_come_back(
    settings: Settings, tmp_path: Path
) -> None:
    chain = {**json.loads(CHAIN), "plugins": [{"type": PLUGIN}, {"type": "bridge"}]}
    (tmp_path / "pods.conflist").write_text(json.dumps(chain))
    path = settings.conf_dir / "10-pods.conflist"
    path.symlink_to("../pods.conflist")
    cni_install.install(settings)
    uninstall(settings)
    assert plugins(path) == ["bridge"]


def test_a_chain_that_lay_behind_a_single_plugin_of_its_name_comes_back_too(
    settings: Settings,
) -> None:
    (settings.conf_dir / "10-pods.conf").write_bytes(SINGLE)
    (settings.conf_dir / "10-pods.conflist").write_bytes(CHAIN)
    before = listing(settings.conf_dir)
    cni_install.install(settings)
    assert plugins(settings.conf_dir / "10-pods.conflist") == ["ptp", PLUGIN]
    uninstall(settings)
    assert listing(settings.conf_dir) == before


def test_what_somebody_says_in_the_plugins_entry_stays(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    said = {"mesh": True, "service": "web", "wait_s": 9, "on_agent_absent": "open"}
    theirs = {"type": PLUGIN, "capabilities": {"aliases": True}, "tidegate": said}
    chain = {**json.loads(CHAIN), "plugins": [{"type": "bridge"}, theirs, {"type": "tuning"}]}
    path.write_text(json.dumps(chain))
    state = cni_install.install(settings)
    assert state.chained is Chained.LAST
    entry = json.loads(path.read_bytes())["plugins"][-1]
    assert entry["capabilities"] == {"aliases": True}
    assert entry["tidegate"] == {**said, **settings.entry["tidegate"]}
    uninstall(settings)
    assert plugins(path) == ["bridge", "tuning"]


def test_a_chain_of_nothing_else_is_left_as_it_is(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_text(json.dumps({**json.loads(CHAIN), "plugins": [settings.entry]}))
    before = path.read_bytes()
    assert "names no plugin but tidegate-cni" in uninstall(settings)[0]
    assert path.read_bytes() == before


@pytest.mark.parametrize("replace", [False, True])
def test_consuls_plugin_comes_back_if_it_was_taken_out_and_not_if_it_went(
    settings: Settings, replace: bool
) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_text(json.dumps({**json.loads(CHAIN), "plugins": [{"type": "bridge"}, CONSUL]}))
    settings = Settings(
        conf_dir=settings.conf_dir, bin_dir=settings.bin_dir, replace_consul=replace
    )
    cni_install.install(settings)
    document = json.loads(path.read_bytes())
    others = [one for one in document["plugins"] if one != CONSUL]
    if replace:
        others.insert(0, {"type": "loopback"})
    path.write_text(json.dumps({**document, "plugins": others}))
    uninstall(settings)
    assert plugins(path) == (["loopback", "bridge", "consul-cni"] if replace else ["bridge"])


@pytest.mark.parametrize("replace", [False, True])
def test_consuls_plugin_is_named_and_replaced_only_when_asked(
    settings: Settings, replace: bool
) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    text = json.dumps({**json.loads(CHAIN), "plugins": [{"type": "bridge"}, CONSUL]}).encode()
    path.write_bytes(text)
    assert "consul-cni" in cni_install.look(settings).problems[0]
    settings = Settings(
        conf_dir=settings.conf_dir, bin_dir=settings.bin_dir, replace_consul=replace
    )
    state = cni_install.install(settings)
    assert state.consul is not replace
    assert plugins(path) == ["bridge", *(() if replace else ("consul-cni",)), PLUGIN]
    uninstall(settings)
    assert path.read_bytes() == text


def test_for_multus_only_the_plugin_is_there(settings: Settings) -> None:
    (settings.conf_dir / "10-pods.conflist").write_bytes(CHAIN)
    alone = Settings(conf_dir=settings.conf_dir, bin_dir=settings.bin_dir, chain=False)
    state = cni_install.install(alone)
    assert cni_install.is_as_wanted(state, alone)
    assert listing(settings.conf_dir) == {"10-pods.conflist": CHAIN}


def test_other_settings_replace_those_of_before_and_not_what_was_saved(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    cni_install.install(settings)
    other = Settings(conf_dir=settings.conf_dir, bin_dir=settings.bin_dir, always_start=("infra",))
    assert cni_install.look(other).chained is Chained.OTHER
    cni_install.install(other)
    assert json.loads(path.read_bytes())["plugins"][1:] == [other.entry]
    uninstall(other)
    assert path.read_bytes() == CHAIN


def test_the_plugin_is_replaced_while_it_runs(settings: Settings) -> None:
    settings.bin_dir.mkdir()
    plugin = settings.bin_dir / PLUGIN
    plugin.write_bytes(Path("/usr/bin/sleep").read_bytes())
    plugin.chmod(0o755)
    pid = os.posix_spawn(plugin, ["sleep", "60"], {})
    try:
        assert cni_install.install(settings).plugin_is_ours
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_directory_that_cannot_be_written_is_named_with_the_option(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cni_install, "_replace", refuse)
    with pytest.raises(
        TidegateError, match=r"tidegate-cni cannot be changed: Read-only.*--bin-dir"
    ):
        cni_install.install(settings)


def test_a_disk_that_is_full_leaves_everything_as_it_was(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    cni_install.install(settings)
    (settings.bin_dir / PLUGIN).write_bytes(b"older")
    path.write_bytes(CHAIN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room, what in ((100, "tidegate-cni"), (len(CHAIN) + 10, "10-pods.conflist")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
            with pytest.raises(TidegateError, match=f"{what} cannot be changed: File too large"):
                cni_install.install(settings)
            assert path.read_bytes() == CHAIN
            assert not list(settings.conf_dir.glob(".*"))
            assert [*listing(settings.bin_dir)] == [PLUGIN]
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            cni_install._install_plugin(settings.bin_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_installers_of_two_versions_do_not_disturb_each_other(settings: Settings) -> None:
    """As during an upgrade: each file is at any time one that somebody has written to the end."""
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    other = Settings(conf_dir=settings.conf_dir, bin_dir=settings.bin_dir, always_start=("infra",))
    problems: list[Exception] = []

    def install_again_and_again(wanted: Settings) -> None:
        for _ in range(30):
            try:
                (settings.bin_dir / PLUGIN).unlink(missing_ok=True)
                cni_install.install(wanted)
                assert plugins(path) == ["bridge", PLUGIN]
            except (TidegateError, OSError, ValueError, AssertionError) as problem:
                problems.append(problem)

    threads = [
        threading.Thread(target=install_again_and_again, args=(wanted,))
        for wanted in (settings, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one for one in problems if "changes all the time" not in str(one)] == []
    assert (settings.bin_dir / PLUGIN).read_bytes() == packaged_plugin().read_bytes()
    uninstall(settings)
    assert listing(settings.conf_dir) == {"10-pods.conflist": CHAIN}


def test_what_an_installer_that_was_killed_left_is_no_trouble_and_goes(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    left = settings.conf_dir / ".10-pods.conflist.0badcafe.tidegate-new"
    left.write_bytes(CHAIN[:9])
    cni_install.install(settings)
    assert left in cni_install.traces(settings.conf_dir, settings.bin_dir)
    uninstall(settings)
    assert listing(settings.conf_dir) == {"10-pods.conflist": CHAIN}


def test_a_pipe_between_the_files_is_not_waited_for(settings: Settings) -> None:
    os.mkfifo(settings.conf_dir / "00-pipe.conf")
    (settings.conf_dir / "01-directory.conf").mkdir()
    (settings.conf_dir / "02-dangling.conf").symlink_to("nowhere")
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    assert cni_install.install(settings).configuration == path


def test_a_change_while_the_new_file_is_written_is_not_lost(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    cni_install._install_plugin(settings.bin_dir)
    newer = [CHAIN.replace(b"1450", b"9000"), CHAIN.replace(b"1450", b"1500")]
    fsync = os.fsync

    def rewrite_then_fsync(descriptor: int) -> None:
        if newer:
            path.write_bytes(newer.pop())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", rewrite_then_fsync)
    cni_install.install(settings)
    assert json.loads(path.read_bytes())["plugins"] == [
        {"type": "bridge", "mtu": 9000},
        settings.entry,
    ]
    uninstall(settings)
    assert path.read_bytes() == CHAIN.replace(b"1450", b"9000")


def test_a_file_that_somebody_replaces_meanwhile_is_read_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    newer = CHAIN.replace(b"1450", b"9000")
    read = cni_install._first_usable
    rewritten = []

    def read_then_rewrite(directory: Path) -> object:
        found = read(directory)
        if not rewritten:
            rewritten.append(path.write_bytes(newer))
        return found

    monkeypatch.setattr(cni_install, "_first_usable", read_then_rewrite)
    cni_install.install(settings)
    assert json.loads(path.read_bytes())["plugins"][0]["mtu"] == 9000
    assert plugins(path) == ["bridge", PLUGIN]


@contextmanager
def kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, look_s: float = 3600.0
) -> Iterator[None]:
    """Installed and kept by another thread, which by default looks only when the kernel tells it of a change."""
    monkeypatch.setattr(cni_install, "LOOK_S", look_s)
    monkeypatch.setattr(cni_install, "CHANGES", 100)
    stop, told = os.pipe()
    upkeep = threading.Thread(target=Upkeep(settings).run, args=(stop,))
    upkeep.start()
    try:
        yield
    finally:
        os.write(told, b"\0")
        upkeep.join()
        os.close(stop)
        os.close(told)


def eventually(condition: Callable[[], bool]) -> None:
    """Asks again and again until it is so; fails after DEADLINE_S."""
    waiting = threading.Event()
    for _ in range(int(DEADLINE_S / 0.01)):
        if condition():
            return
        waiting.wait(0.01)
    pytest.fail("waited in vain")


def is_last(path: Path) -> bool:
    try:
        return plugins(path)[-1] == PLUGIN
    except (OSError, ValueError):
        return False


def test_it_waits_for_a_configuration_and_comes_back_when_others_rewrite_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings.conf_dir / "20-pods.conflist"
    with kept(settings, monkeypatch):
        eventually((settings.bin_dir / PLUGIN).is_file)
        path.write_bytes(CHAIN)
        eventually(lambda: is_last(path))
        path.write_bytes(CHAIN)
        eventually(lambda: is_last(path))
        first = settings.conf_dir / "10-new.conflist"
        new = settings.conf_dir / "new"
        new.write_bytes(CHAIN)
        new.rename(first)
        eventually(lambda: is_last(first))
    assert is_last(path)
    assert (settings.bin_dir / PLUGIN).is_file()


def test_it_comes_back_when_the_directories_are_made_anew(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    path.write_bytes(CHAIN)
    with kept(settings, monkeypatch, look_s=0.05):
        eventually(lambda: is_last(path))
        settings.conf_dir.rename(settings.conf_dir.with_name("old-net.d"))
        settings.bin_dir.rename(settings.bin_dir.with_name("old-bin"))
        eventually((settings.bin_dir / PLUGIN).is_file)
        settings.conf_dir.mkdir()
        (settings.conf_dir / "10-pods.conf").write_bytes(SINGLE)
        eventually(lambda: is_last(path))
        path.write_bytes(CHAIN[:40])
        path.write_bytes(CHAIN)
        eventually(lambda: is_last(path))
        path.unlink()
        path.write_bytes(CHAIN)
        eventually(lambda: is_last(path))
    uninstall(settings)
    assert listing(settings.conf_dir) == {"10-pods.conflist": CHAIN}


def test_where_the_kernel_lets_nobody_watch_it_is_looked_at_now_and_then(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise KernelError("cannot watch files: Too many open files", errno.EMFILE)

    monkeypatch.setattr(cni_install, "Watch", refuse)
    path = settings.conf_dir / "10-pods.conflist"
    with kept(settings, monkeypatch, look_s=0.05):
        eventually((settings.bin_dir / PLUGIN).is_file)
        path.write_bytes(CHAIN)
        eventually(lambda: is_last(path))


def test_a_plugin_that_somebody_removes_comes_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(settings, monkeypatch):
        plugin = settings.bin_dir / PLUGIN
        eventually(plugin.is_file)
        # Its directory is watched from the next look on, which its coming there has begun.
        (settings.conf_dir / "10-pods.conflist").write_bytes(CHAIN)
        eventually(lambda: is_last(settings.conf_dir / "10-pods.conflist"))
        plugin.unlink()
        eventually(plugin.is_file)


def test_who_fights_for_the_last_place_is_not_fought_without_end(settings: Settings) -> None:
    path = settings.conf_dir / "10-pods.conflist"
    upkeep = Upkeep(settings)
    for _ in range(cni_install.CHANGES):
        path.write_bytes(CHAIN)
        upkeep.step()
        assert is_last(path)
    path.write_bytes(CHAIN)
    upkeep.step()
    assert path.read_bytes() == CHAIN


def test_the_commands_say_what_is_there(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--conf-dir", str(settings.conf_dir), "--bin-dir", str(settings.bin_dir)]
    assert main(["cni", "status", *where]) == 1
    assert "is not there" in capsys.readouterr().out
    assert main(["cni", "install", *where]) == 1
    assert "--keep" in capsys.readouterr().err
    (settings.conf_dir / "10-pods.conflist").write_bytes(CHAIN)
    assert main(["cni", "install", *where]) == 0
    assert main(["cni", "status", *where]) == 0
    assert "the last of its chain" in capsys.readouterr().out
    assert main(["cni", "status", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out)["chained"] == "last"
    assert main(["cni", "uninstall", *where]) == 0
    assert main(["cni", "uninstall", *where]) == 0
    assert "nothing was installed" in capsys.readouterr().out
    assert main(["cni", "install", *where, "--cni-socket", "cni.sock"]) == 2
    assert "--cni-socket: 'cni.sock' depends on" in capsys.readouterr().err
