"""Reports: the page of one run, a page that compares several runs, and pictures of a split.

write_report(run)        run/report.html from the files of the run folder
report_many(runs, out)   several runs on one page
split_picture(split, p)  clients × categories as .svg, .html, .png or .pdf
"""

from __future__ import annotations

from fedloom.reporting.charts import split_picture
from fedloom.reporting.html import report_many, write_report

__all__ = ["report_many", "split_picture", "write_report"]
