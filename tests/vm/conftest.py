"""Machines that boot a whole system: only where TIDEGATE_VM is set, as `make test-vm` does, for it takes minutes."""

import os

collect_ignore_glob = [] if os.environ.get("TIDEGATE_VM") else ["test_*.py"]
