"""Does in the virtual machine what the test says: a line of JSON for each order, and one for what became of it.

In: {"command": [...], "input": "..."}. Out: {"status": ..., "output": "..."}, and before the first order of a boot
{"boot": id}.
"""

import json
import os
import subprocess
import tty
from pathlib import Path
from typing import Any

LINE = "/dev/ttyS1"
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def main() -> None:
    line = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    tell(line, {"boot": BOOT})
    with os.fdopen(os.dup(line), "r") as orders:
        for order in orders:
            tell(line, obeyed(json.loads(order)))


def obeyed(order: dict[str, Any]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            order["command"],
            input=order["input"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError as error:
        return {"status": 127, "output": str(error)}
    return {"status": done.returncode, "output": done.stdout}


def tell(line: int, what: dict[str, Any]) -> None:
    # Whatever was on the line before, this begins on one of its own.
    rest = f"\n{json.dumps(what)}\n".encode()
    while rest:
        rest = rest[os.write(line, rest) :]


if __name__ == "__main__":
    main()
