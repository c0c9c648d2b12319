"""A caller from another network namespace: knocks at the service all the time, and notes what becomes of each knock.

`knock.py ADDRESS PORT LOG`; a line of the log has the boot's id, the time in seconds since the epoch, and an outcome.
"""

import os
import socket
import sys
import time
from pathlib import Path

TIMEOUT_S = 0.5
PAUSE_S = 0.03


def main() -> None:
    address, port, log = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with log.open("a", buffering=1) as told:
        told.write(f"{boot} {time.time():.3f} {knock(address, port)}\n")
        tell_ready()
        while True:
            told.write(f"{boot} {time.time():.3f} {knock(address, port)}\n")
            time.sleep(PAUSE_S)


def knock(address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), TIMEOUT_S) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := caller.recv(4096):
                answer += part
    except OSError as error:
        return type(error).__name__
    return "answered" if answer.startswith(b"HTTP/1.1 200 ") else "ended"


def tell_ready() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


if __name__ == "__main__":
    main()
