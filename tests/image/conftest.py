"""The image of init/Containerfile: only where TIDEGATE_IMAGE is set, as `make image` does, for it fetches packages."""

import os
import sys
from pathlib import Path

# What the kernel tests share is good here too.
sys.path.append(str(Path(__file__).parent.parent / "kernel"))

collect_ignore_glob = [] if os.environ.get("TIDEGATE_IMAGE") else ["test_*.py"]
