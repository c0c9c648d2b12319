"""Structured logs: one JSON object per line on standard error.

Fields are given as keyword arguments and never contain key material; levels are those of `logging`.
"""

import json
import logging
import sys
import time

REPEATED_S = 10.0
"""What a library says again within this time is left out..."""
MESSAGES_KEPT = 100
"""...as long as it does not say more different things than this."""


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "part": record.name.removeprefix("tidegate."),
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _OnceInAWhile(logging.Filter):
    """Without file descriptors asyncio has a traceback for each connection that waits, hundreds a second: a disk full.

    What tidegate says itself is not held back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("tidegate."):
            return True
        what, now = (record.name, record.getMessage().partition("\n")[0]), time.monotonic()
        said = self._said.get(what)
        if said is not None and now - said < REPEATED_S:
            return False
        if len(self._said) >= MESSAGES_KEPT:
            self._said.clear()
        self._said[what] = now
        return True


class Log:
    """A named logger that takes fields: `log.info("sidecar started", workload="api", pid=12)`."""

    def __init__(self, part: str) -> None:
        self._logger = logging.getLogger(f"tidegate.{part}")

    def info(self, message: str, **fields: object) -> None:
        self._logger.info("%s", message, extra={"fields": fields})

    def warning(self, message: str, **fields: object) -> None:
        self._logger.warning("%s", message, extra={"fields": fields})

    def exception(self, message: str, error: Exception, **fields: object) -> None:
        """Logs with the traceback of an exception: a defect of ours."""
        self._logger.error("%s", message, extra={"fields": fields}, exc_info=error)


def set_up() -> None:
    """Sends the logs of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    handler.addFilter(_OnceInAWhile())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
