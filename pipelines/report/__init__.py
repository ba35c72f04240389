"""The report: what the students kept of their teacher, as a table and as one page."""

from pipelines.report.command import report_command

__all__ = ["report_command"]
