"""The HTML report of one run or of a whole comparison."""

from exfm.launch.report.write import write_report

__all__ = ["write_report"]
