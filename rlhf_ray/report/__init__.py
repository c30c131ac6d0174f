"""The report of one run, or of several side by side: a self-contained HTML page, readable in light and dark mode and on paper."""

from rlhf_ray.report.comparison import write_comparison
from rlhf_ray.report.page import output_file, write_report

__all__ = ["output_file", "write_comparison", "write_report"]
