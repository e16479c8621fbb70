"""``python -m lmprobe_zarr``."""

from lmprobe_zarr.cli import main

raise SystemExit(main())
