"""How many examples a test draws."""

import os


def examples(few: int, many: int) -> int:
    """The few of `make test`, or the many of `make stress`."""
    return many if "LMPROBE_ZARR_STRESS" in os.environ else few
