"""One HTML page about a store: what it holds, norms and outliers, scores by layer, tokens.

``report`` chooses what is shown, ``profiles`` reads and summarises activations, ``tokens`` prepares token maps. Pictures and markup are
those of the room ``pages``. Only the command line and the package itself import from here, so
nothing here is computed for another room. Everything that a page shows is bounded, whatever the size of the store.
"""

from lmprobe_zarr.reports.report import Report, report

__all__ = ["Report", "report"]
