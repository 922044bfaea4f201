"""The two ways in which a run ends early with one line instead of a traceback.

Everything else that is raised is a defect of the program and keeps its
traceback.
"""

from __future__ import annotations


class UsageError(Exception):
  """What was asked for cannot be done; exit code 2."""


class RunError(Exception):
  """A run that was going could not go on; exit code 1."""
