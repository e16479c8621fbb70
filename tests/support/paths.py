"""Where the repository and the stored files of the tests are."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
SUPPORT = TESTS / "support"
DATA = TESTS / "data"
OLD_STORES = TESTS / "old_stores"
