"""Logging of the long-running processes: one line an event, on standard error, for the journal or a file."""

from __future__ import annotations

import logging
import sys

import structlog


class _WithoutFalseAlarms(logging.Filter):
    """uvicorn says, as an error, that it closed idle connections when it was told to stop."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "timeout graceful shutdown exceeded" not in record.getMessage()


def log_to_stderr() -> None:
    """Log lines of ours and of libraries to standard error. Tracebacks never show the values of variables."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("uvicorn.error").addFilter(_WithoutFalseAlarms())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,  # plain text; the pretty renderer would print local variables
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
