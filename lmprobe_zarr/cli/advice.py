"""What errors advise in Python, said with the options of a command. Never changes what an error says of its cause."""

from __future__ import annotations

import argparse
import re
from typing import Final

__all__ = ["for_shell"]

#: Advice in Python, as a regular expression; the option that a command needs for the advice beside it, if any; and that advice.
_ADVICE: Final[tuple[tuple[str, str | None, str], ...]] = (
    (r"storage_options=\{'(anon': True|token': 'anon'|token': False)\}", "--anon", "--anon"),
    (r"storage_options=(\{)?", "--storage-options", r"--storage-options \1"),
    (r"--storage-options (?=[ ,;)]|$)", None, "--storage-options"),
    (r", or open it with mode='a' to make one", None, ""),
    (r"pass truncation=True", "--truncation", "give --truncation"),
    (r"pass max_length=", "--max-length", "give --max-length"),
    (r"missing='drop'", "--missing", "--missing drop"),
    (r", or drop these prompts first, as with \.isel\(prompt=…\)", "--missing", ", or leave them out with --missing drop"),
    (r", or drop these prompts first, as with \.isel\(prompt=…\)", None, ""),
    (r"extract it for them with layers=\[([^\]]*)\]", None, r"extract it for them with --layers \1"),
    (r", or leave these prompts out with \.dropna\('prompt'\)", "--layers", ", or choose other layers with --layers"),
    (r", or leave these prompts out with \.dropna\('prompt'\)", None, ""),
    (r", or a scikit-learn estimator", None, ""),
    (r"; extract them first", "--yes", "; nothing was deleted"),
)


def for_shell(message: str, command: argparse.ArgumentParser | None) -> str:
    """The message of an error with options in place of arguments of Python.

    Parameters
    ----------
    message : str
        What the error says.
    command : ArgumentParser, optional
        Of the command that failed. Of options that not every command has, only its own are advised.

    Returns
    -------
    str
    """
    options = set(command._option_string_actions) if command else set()
    for advice, option, instead in _ADVICE:
        if option is None or option in options:
            message = re.sub(advice, instead, message)
    return message
