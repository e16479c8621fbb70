"""Names with characters that file systems, shells, patterns and URLs give a meaning."""

from __future__ import annotations

NAMES = [
    "run[12]", "run[!1]", "run*", "run?", "run{1,2}", "run#1", "50%", "a%20b", "a b", "a+b", "~run", "run!", "$1", "a;b", "a\nb", "-rf",
    "日本", "naïve", "a'b", 'a"b', "a=b", "a,b", "a@b", "(a)", "a|b", "<a>", "a^b", "a`b", "a\\b", "**", ".hidden", "a:b", "a&b",
]  # fmt: skip
