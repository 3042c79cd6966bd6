"""The package's own exceptions. Each also derives from the builtin that a caller would expect to catch."""

from __future__ import annotations

__all__ = [
    "ClipError",
    "ClusterError",
    "DetachedCamError",
    "HostError",
    "LanguageModelError",
    "PromptFileError",
    "SemplesError",
]


class SemplesError(Exception):
    """Base of all errors that are particular to this package (wrong arguments raise plain TypeError / ValueError)."""


class ClipError(SemplesError, RuntimeError):
    """A CLIP model is missing, is not readable, or is not of a kind that can be used."""


class ClusterError(SemplesError, ValueError):
    """Category clusters are no partition of the classes, or their file cannot be read."""


class DetachedCamError(SemplesError, ValueError):
    """The CAM is cut off from the host's graph, so a loss on it would train nothing."""


class HostError(SemplesError, RuntimeError):
    """A host network is not of the kind that was expected, or did not run as it should have."""


class LanguageModelError(SemplesError, RuntimeError):
    """A language model could not be reached, refused, or gave no usable clusters."""


class PromptFileError(SemplesError, ValueError):
    """A prompt file is damaged, foreign, or made for other classes or another CLIP."""
