"""The report of a run, or of several side by side: one self-contained page for people, readable in light and dark, on
paper, and from an archive."""

from rlhf_ray.report.comparison import write_comparison
from rlhf_ray.report.page import output_file, write_report

__all__ = ["output_file", "write_comparison", "write_report"]
