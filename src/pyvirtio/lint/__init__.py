"""The lint: watches a driver and a device, and reports what the specification does not allow.

It changes nothing and decides nothing; a device that it does not watch pays nothing for it. See docs/lint.md.
"""

from pyvirtio.lint.lint import Lint
from pyvirtio.lint.report import Report, Violation

__all__ = ["Lint", "Report", "Violation"]
