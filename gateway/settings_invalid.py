"""The error of a configuration that cannot be used; apart, so that the command line need not load what reads one."""

from __future__ import annotations


class SettingsInvalid(Exception):
    """A configuration file cannot be used; the message names the file, the key and what is expected."""
