"""Real clients against real servers: only where TIDEGATE_LIVE is set, as `make live` does, for it fetches packages."""

import os
import sys
from pathlib import Path

# What the kernel tests share is good here too.
sys.path.append(str(Path(__file__).parent.parent / "kernel"))

collect_ignore_glob = [] if os.environ.get("TIDEGATE_LIVE") else ["test_*.py"]
