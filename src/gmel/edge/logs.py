"""What processes say: one line of JSON for each thing that is worth one, on the standard error."""

import json
import logging
import sys

__all__ = ["structured_logs"]


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = {"at": self.formatTime(record), "level": record.levelname.lower(), "log": record.name}
        said["message"] = record.getMessage()
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said)


def structured_logs() -> None:
    """Sets the logs of this process up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
