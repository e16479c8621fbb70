"""HTML pages that fetch nothing: the report about a store, and the page beside a published copy.

``records`` are the values that a page shows, ``pictures`` draws SVG, ``page`` writes the markup. Never reads a store and never computes a
score: other rooms do, and import from here.
"""

from lmprobe_zarr.pages.page import PUBLISHED, generator, write_page
from lmprobe_zarr.pages.pictures import Chart, Series
from lmprobe_zarr.pages.records import Coverage, GroupPage, LayerProfile, ListedGroup, ShownPrompt, ShownTokens, TokenMap

__all__ = [
    "PUBLISHED",
    "Chart",
    "Coverage",
    "GroupPage",
    "LayerProfile",
    "ListedGroup",
    "Series",
    "ShownPrompt",
    "ShownTokens",
    "TokenMap",
    "generator",
    "write_page",
]
