"""``python -m lmprobe_zarr``."""

from __future__ import annotations

from lmprobe_zarr.cli import main

raise SystemExit(main())
