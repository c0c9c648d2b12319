"""Structured logs: one JSON object per line on standard error.

Fields are given as keyword arguments and never contain key material; levels are those of `logging`.
"""

import json
import logging
import sys
import time


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
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
