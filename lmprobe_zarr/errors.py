"""Every error class of the package, and nothing else.

Each class is also the nearest built-in exception, so ``except ValueError`` works as usual. There is a class only for errors that a caller
may want to handle differently; all others are an :class:`InvalidArgumentError`.
"""

from __future__ import annotations

__all__ = [
    "AccessDeniedError",
    "AlreadyCommittedError",
    "AmbiguousProvenanceError",
    "CacheWarning",
    "CorruptFileError",
    "CorruptPartError",
    "DeviceMemoryError",
    "EngineError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "LabelError",
    "LayerOutOfRangeError",
    "LmprobeZarrError",
    "MissingDependencyError",
    "MissingPromptsError",
    "ModelNotFoundError",
    "ModelNotStoredError",
    "NoSpaceError",
    "NotAProbeError",
    "NotAStoreError",
    "NotFittedError",
    "NumberRangeError",
    "PartGoneError",
    "PromptCollisionError",
    "PromptTooLongError",
    "ReadOnlyError",
    "StoreNotFoundError",
    "UnknownArchitectureError",
    "UnreachableError",
    "UnsupportedVersionError",
]


class LmprobeZarrError(Exception):
    """Base class of all errors that this package raises deliberately."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message, with quotes.
        return str(self.args[0]) if self.args else ""


class InvalidArgumentError(LmprobeZarrError, ValueError):
    """An argument has a value that cannot be used."""


class InvalidTypeError(LmprobeZarrError, TypeError):
    """An argument has a type that cannot be used."""


class LayerOutOfRangeError(LmprobeZarrError, IndexError):
    """A requested layer is not one of the model's, or is not stored."""


class LabelError(LmprobeZarrError, ValueError):
    """Labels do not match the prompts, or no probe can learn from them."""


class PromptTooLongError(LmprobeZarrError, ValueError):
    """A prompt has more tokens than the model's context window."""


class PromptCollisionError(LmprobeZarrError, ValueError):
    """Two different prompts share one 16-digit hash."""


class MissingPromptsError(LmprobeZarrError, KeyError):
    """Requested prompts are not stored."""


class ModelNotStoredError(LmprobeZarrError, KeyError):
    """The store holds nothing for that model, provenance or group."""


class AmbiguousProvenanceError(LmprobeZarrError, ValueError):
    """Several groups of the store match the caller's arguments."""


class StoreNotFoundError(LmprobeZarrError, FileNotFoundError):
    """There is no store at that place."""


class NotAStoreError(LmprobeZarrError, ValueError):
    """The place holds something other than a store of this package."""


class NotAProbeError(LmprobeZarrError, ValueError):
    """A file is not a saved probe of this package, or is damaged."""


class UnsupportedVersionError(LmprobeZarrError, ValueError):
    """A store or a saved probe has a format version that this release cannot read."""


class ReadOnlyError(LmprobeZarrError, PermissionError):
    """A store cannot be written to: it was opened for reading, or its place is read-only."""


class NoSpaceError(LmprobeZarrError, OSError):
    """The disk is full, or too small for what is to be stored."""


class NumberRangeError(LmprobeZarrError, OverflowError):
    """A value is beyond the range of the dtype to store it with."""


class AccessDeniedError(LmprobeZarrError, PermissionError):
    """A place cannot be read with the given credentials, or without any; it may not even exist."""


class AlreadyCommittedError(LmprobeZarrError, FileExistsError):
    """Another writer has committed something else under the same name."""


class UnreachableError(LmprobeZarrError, ConnectionError):
    """A place does not answer."""


class CorruptPartError(LmprobeZarrError, OSError):
    """A committed part lacks a file, or one of its files has changed since the commit.

    Attributes
    ----------
    part : str or None
        Key of the part's folder below the root; None if the damage is not in a part.
    root : str or None
        URL of the root.
    """

    part: str | None = None
    root: str | None = None

    @classmethod
    def of(cls, root: str, part: str, message: str) -> CorruptPartError:
        """The error for one part, which names it so that a caller can continue without it."""
        error = cls(message)
        error.root, error.part = root, part
        return error


class CacheWarning(UserWarning):
    """The cache could not do something, and the call continued without it."""


class CorruptFileError(LmprobeZarrError, OSError):
    """A foreign file is damaged or unsafe, or does not follow its format."""


class PartGoneError(LmprobeZarrError, FileNotFoundError):
    """A part of an open view has been deleted since the view was opened."""


class NotFittedError(LmprobeZarrError, ValueError, AttributeError):
    """A probe that is not fitted was used to predict."""


class ModelNotFoundError(LmprobeZarrError, OSError):
    """A model cannot be loaded."""


class UnknownArchitectureError(LmprobeZarrError, ValueError):
    """The decoder blocks of a model could not be found by name."""


class DeviceMemoryError(LmprobeZarrError, MemoryError):
    """The device has too little memory for a single prompt."""


class EngineError(LmprobeZarrError, RuntimeError):
    """An engine that runs the model failed, or did not give one row for every token."""


class MissingDependencyError(LmprobeZarrError, ImportError):
    """An optional dependency is not installed."""
