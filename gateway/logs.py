"""Logging: structured lines on standard error, one format for our loggers and for the libraries'.

Patient data has no place in a log. Our own messages carry UIDs and identifiers of ours only; libraries that print
values of data sets (pydicom, Python warnings) are kept at levels where they do not.
"""

from __future__ import annotations

import logging
import sys
import warnings

import structlog

from gateway.settings import LoggingSettings


def configure(settings: LoggingSettings, *, process: str) -> None:
    """Set up logging for this process; `process` (receiver, worker, …) is on every line."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if settings.format == "json":
        renderers: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        # Locals of a traceback would print data sets.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    # pydicom's warnings quote the values they complain about.
    warnings.simplefilter("ignore")
    for name, level in settings.loggers.items():
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.handlers.clear()
        logger.propagate = True


def keep_off_standard_output() -> None:
    """For a command: what it prints may be one JSON document, so lines of the log go to standard error."""
    # All of it: processors that were configured for another kind of logger would fail on this one.
    structlog.reset_defaults()
    # Asked anew for each line: whoever runs commands one after the other may have exchanged the stream.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
