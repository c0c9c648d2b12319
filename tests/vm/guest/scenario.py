"""What happens in the virtual machine: it puts a service behind its sidecar, disturbs it in many ways, and reboots.

Runs as a unit of its own at each boot. In the first one it does as docs/systemd.md says; in the second it only looks.
What it has seen it tells as JSON on the last serial line, and then the machine is switched off.
"""

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path("/root/tidegate")
TIDEGATE = "/opt/tidegate/bin/tidegate"
STATE = Path("/var/lib/scenario")
RESULT = Path("/dev/ttyS2")
KNOCKS, ACCEPTED, SEEN = STATE / "knocks", STATE / "accepted", STATE / "seen.json"
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

ADDRESS, PORT, PROBER, ROUTER = "10.11.0.2", 8080, "10.99.0.2", "10.99.0.1"
DEADLINE_S = 400.0

FILES = {
    "/etc/sysctl.d/90-tidegate.conf": "net.ipv4.ip_forward = 1\n",
    "/etc/tidegate/server.yaml": "state_dir: /var/lib/tidegate-server\ntrust_domain: vm.test\n",
    "/etc/tidegate/agent.yaml": f"""\
node: vm
server: unix:///run/tidegate/server.sock
trust_domain: vm.test
processes:
  - service: web
    port: {PORT}
    network: {{addresses: [{ADDRESS}]}}
  - service: job
    unit: job.service
""",
    "/etc/tidegate/mesh.yaml": """\
Kind: mesh
AllowEnablingPermissiveMutualTLS: true
---
Kind: service-defaults
Name: web
Protocol: tcp
MutualTLSMode: permissive
""",
    "/etc/systemd/system/web.service": f"""\
[Unit]
Description=The service
[Service]
Type=exec
ExecStart=/usr/bin/python3 {CHECKOUT}/tests/vm/guest/application.py {PORT} {ACCEPTED}
[Install]
WantedBy=multi-user.target
""",
    # A service in a network of somebody else's: it is found by its unit.
    "/etc/systemd/system/job.service": """\
[Service]
Type=exec
ExecStartPre=+sh -c 'ip netns add job; ip -n job link set lo up; \
    ip link add to-job type veth peer name eth0 netns job; ip -n job address add 10.12.0.2/30 dev eth0; \
    ip -n job link set eth0 up; ip link set to-job up'
ExecStart=+ip netns exec job sleep infinity
ExecStopPost=+sh -c 'ip link delete to-job; ip netns delete job'
""",
    # The service starts at once: it is closed, while its sidecar is not there yet, that is to be seen.
    "/etc/systemd/system/tidegate-sidecar@.service.d/at-once.conf": f"""\
[Service]
ExecStart=
ExecStart={TIDEGATE} sidecar up %i
""",
    "/etc/systemd/system/knock.service": f"""\
[Unit]
DefaultDependencies=no
After=local-fs.target systemd-sysctl.service
Before=tidegate-sidecar@web.service web.service
Conflicts=shutdown.target
Before=shutdown.target
[Service]
Type=notify
NotifyAccess=all
ExecStartPre=/usr/sbin/ip netns add prober
ExecStartPre=/usr/sbin/ip link add to-prober type veth peer name eth0 netns prober
ExecStartPre=/usr/sbin/ip address add {ROUTER}/30 dev to-prober
ExecStartPre=/usr/sbin/ip link set to-prober up
ExecStartPre=/usr/sbin/ip -n prober address add {PROBER}/30 dev eth0
ExecStartPre=/usr/sbin/ip -n prober link set eth0 up
ExecStartPre=/usr/sbin/ip -n prober route add default via {ROUTER}
ExecStart=/usr/sbin/ip netns exec prober \
    /usr/bin/python3 {CHECKOUT}/tests/vm/guest/knock.py {ADDRESS} {PORT} {KNOCKS}
[Install]
WantedBy=sysinit.target
""",
}


def main() -> None:
    seen = json.loads(SEEN.read_text()) if SEEN.exists() else {"boots": []}
    seen["boots"].append(BOOT)
    try:
        again = len(seen["boots"]) > 1
        steps = after_reboot() if again else in_the_beginning()
        seen.setdefault("steps", []).extend(steps)
        if not again:
            SEEN.write_text(json.dumps(seen))
            run("systemctl", "reboot")
            return
    except Exception:  # noqa: BLE001 - whatever it is, it is told
        seen["failure"] = traceback.format_exc()
        log = run("journalctl", "--boot", "--no-pager", "--output=cat", "-n", "150", check=False)
        seen["journal"] = log[-20000:]
    seen["knocks"] = KNOCKS.read_text() if KNOCKS.exists() else ""
    seen["accepted"] = ACCEPTED.read_text() if ACCEPTED.exists() else ""
    RESULT.write_text(json.dumps(seen) + "\n")
    run("systemctl", "poweroff")


def in_the_beginning() -> list[str]:
    steps = []

    def step(name: str) -> None:
        steps.append(name)
        print(f"{time.monotonic():7.1f} s: {name}", flush=True)

    step("configuration")
    for path, text in FILES.items():
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    drop_in = Path("/etc/systemd/system/web.service.d/tidegate.conf")
    drop_in.parent.mkdir()
    drop_in.write_text((CHECKOUT / "systemd/tidegate-sidecar.conf").read_text())
    run("sysctl", "--quiet", "--load", "/etc/sysctl.d/90-tidegate.conf")
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "tidegate-server", "tidegate-agent", "web", "knock")

    step("server")
    run("systemctl", "start", "tidegate-server")
    run(TIDEGATE, "config", "write", "/etc/tidegate/mesh.yaml")

    step("the service starts")
    run("systemctl", "start", "knock")
    run("systemctl", "start", "web")
    until_answered("the service started")

    step("the agent starts again")
    run("systemctl", "restart", "tidegate-agent")
    until_answered("the agent started again")
    run("systemctl", "reload", "tidegate-agent")

    step("the service starts again")
    run("systemctl", "restart", "web")
    until_answered("the service started again")

    step("the sidecar is killed")
    before = sidecars()
    run("kill", "-KILL", *before)
    until("another sidecar runs", lambda: sidecars() not in ([], before))
    until_answered("the sidecar was killed")

    step("the place is made anew")
    run("systemctl", "restart", "tidegate-sidecar@web")
    until_answered("the place was made anew")

    step("a service is found by its unit")
    run("systemctl", "start", "job")
    until("the service that has a unit is looked after", lambda: is_looked_after("job"))
    before = (status_of("job") or {})["id"]
    run("systemctl", "restart", "job")
    until("it is, in its new network", lambda: is_looked_after("job", but=before))

    step("reboot")
    return steps


def after_reboot() -> list[str]:
    until_answered("the machine booted again")
    run("systemctl", "is-active", "tidegate-agent", "tidegate-server", "tidegate-sidecar@web")
    run("systemctl", "stop", "tidegate-sidecar@web")
    state = run("systemctl", "is-active", "web", check=False).strip()
    if state == "active" or "web" in run("ip", "netns", "list").split():
        raise AssertionError("the service or its place outlive tidegate-sidecar@web")
    return ["the second boot"]


def until_answered(after: str) -> None:
    """Until a knock from now on has been answered."""
    begun = time.time()

    def answered() -> bool:
        last = [line.split() for line in KNOCKS.read_text().splitlines()[-200:]]
        return any(
            boot == BOOT and float(at) > begun and outcome == "answered"
            for boot, at, outcome in (line for line in last if len(line) == 3)
        )

    until(f"a knock is answered after {after}", answered)


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")
        time.sleep(0.5)


def is_looked_after(name: str, but: str = "") -> bool:
    """Whether a workload, but not that of this id, is redirected, observed, and has a sidecar."""
    found = status_of(name)
    return (
        found is not None
        and found["id"] != but
        and (found["redirect"], found["state"], found["problem"]) == ("ok", "running", "")
        and found["observed_since"] > 0
    )


def status_of(name: str) -> dict[str, Any] | None:
    (node,) = json.loads(run(TIDEGATE, "status", "--json", check=False))["nodes"]
    return next((one for one in node["workloads"] if one["name"] == name), None)


def sidecars() -> list[str]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                name = (place / "comm").read_text().strip()
            except OSError:
                continue
            if name == "envoy":
                found.append(place.name)
    return found


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
