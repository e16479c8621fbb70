"""A page about a store and its scores, in one HTML file.

Never computes what other rooms need.
"""

from lmprobe_zarr.reports.report import Report, report

__all__ = ["Report", "report"]
