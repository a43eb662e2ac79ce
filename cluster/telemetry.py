"""Logging, set up once a process."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: int = logging.INFO) -> None:
    """Times, level and name on stderr. For commands; replicas log through Serve."""
    logging.getLogger("ray.serve").setLevel(level)  # it has a handler of its own
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
