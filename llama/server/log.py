"""The server's log on stderr: lines of text, or JSON objects."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone

TEXT = "%(asctime)s %(levelname)s %(message)s"


class JsonLines(logging.Formatter):
    """A JSON object for each record: time, level, and its fields or its message, with a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        found = {"time": time, "level": record.levelname}
        found |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def set_up(as_json: bool) -> None:
    """Log to stderr from level INFO on. Lines that cannot be written, as on a full disk, are dropped."""
    # Not sys.stderr: data that could not be written stays in its buffer, and Python would end with exit code 120.
    stream = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.raiseExceptions = False
