"""Every error class of the package, and nothing else.

Each class is also the nearest built-in exception, so that ``except ValueError`` and friends keep working. A class exists
only where a caller would branch on it; everything else is an :class:`InvalidArgumentError`.
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
    """Anything that this package raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message, quotes and all.
        return str(self.args[0]) if self.args else ""


class InvalidArgumentError(LmprobeZarrError, ValueError):
    """An argument has a value that cannot be used."""


class InvalidTypeError(LmprobeZarrError, TypeError):
    """An argument has a type that cannot be used."""


class LayerOutOfRangeError(LmprobeZarrError, IndexError):
    """A layer was asked for that the model, or the stored data, does not have."""


class LabelError(LmprobeZarrError, ValueError):
    """Labels do not fit the prompts, or cannot be learned from."""


class PromptTooLongError(LmprobeZarrError, ValueError):
    """A prompt has more tokens than the model's context window."""


class PromptCollisionError(LmprobeZarrError, ValueError):
    """Two different prompts share one 16-digit hash."""


class MissingPromptsError(LmprobeZarrError, KeyError):
    """Prompts were asked for that are not stored."""


class ModelNotStoredError(LmprobeZarrError, KeyError):
    """The store holds nothing for that model, provenance or group."""


class AmbiguousProvenanceError(LmprobeZarrError, ValueError):
    """Several groups of the store match what the caller said."""


class StoreNotFoundError(LmprobeZarrError, FileNotFoundError):
    """There is no store at that place."""


class NotAStoreError(LmprobeZarrError, ValueError):
    """What lies at that place is something else than a store of this package."""


class NotAProbeError(LmprobeZarrError, ValueError):
    """What was read is no saved probe of this package, or a damaged one."""


class UnsupportedVersionError(LmprobeZarrError, ValueError):
    """A store or a saved probe has a format version that this release does not know."""


class ReadOnlyError(LmprobeZarrError, PermissionError):
    """A write to a store that was opened for reading, or whose place cannot be written."""


class NoSpaceError(LmprobeZarrError, OSError):
    """The medium is full, or too small for what was planned."""


class NumberRangeError(LmprobeZarrError, OverflowError):
    """A value lies beyond the range of the dtype that it is to be stored with."""


class AccessDeniedError(LmprobeZarrError, PermissionError):
    """A place exists, or may exist, but these credentials, or none, may not read it."""


class AlreadyCommittedError(LmprobeZarrError, FileExistsError):
    """Another writer has committed something else under that very name."""


class UnreachableError(LmprobeZarrError, ConnectionError):
    """A place does not answer."""


class CorruptPartError(LmprobeZarrError, OSError):
    """A committed part misses a file, or a file of it is not what was committed.

    Attributes
    ----------
    part : str or None
        Key of the part's folder below the root; None where it is not a part that is damaged.
    root : str or None
        URL of that root.
    """

    part: str | None = None
    root: str | None = None

    @classmethod
    def of(cls, root: str, part: str, message: str) -> CorruptPartError:
        """The error for a part, so that a caller can go on without it."""
        error = cls(message)
        error.root, error.part = root, part
        return error


class CacheWarning(UserWarning):
    """Something that the cache was asked for it could not do, and went on without."""


class CorruptFileError(LmprobeZarrError, OSError):
    """A foreign file is damaged, unsafe, or not what its format says."""


class PartGoneError(LmprobeZarrError, FileNotFoundError):
    """A part that an open view refers to has been deleted since."""


class NotFittedError(LmprobeZarrError, ValueError, AttributeError):
    """A probe was asked for predictions before it has learned anything."""


class ModelNotFoundError(LmprobeZarrError, OSError):
    """A model cannot be loaded."""


class UnknownArchitectureError(LmprobeZarrError, ValueError):
    """The decoder blocks of a model could not be found by name."""


class DeviceMemoryError(LmprobeZarrError, MemoryError):
    """The device has no memory for even a single prompt."""


class MissingDependencyError(LmprobeZarrError, ImportError):
    """An optional dependency is not installed."""
