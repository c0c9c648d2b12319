"""Commands of this checkout for users that are not root: a checkout may lie where they cannot look."""

import stat
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

_LAY_OPEN = """
set -e
top=$1 checkout=$2
shift 2
mount --bind "$checkout" /mnt
mount -t tmpfs -o mode=755 tmpfs "$top"
mkdir -p -m 755 "$checkout"
mount --move /mnt "$checkout"
exec "$@"
"""


def for_everybody(argv: list[str]) -> list[str]:
    """The command, to be begun as root, in mounts of its own where everybody can pass to the checkout."""
    closed = [path for path in CHECKOUT.parents if not path.stat().st_mode & stat.S_IXOTH]
    if not closed:
        return argv
    top = str(closed[-1])
    own_mounts = ["unshare", "--mount", "--propagation", "private"]
    return [*own_mounts, "sh", "-c", _LAY_OPEN, "sh", top, str(CHECKOUT), *argv]
