"""The package's own exceptions. Each also derives from the builtin that a caller would expect to catch."""

from __future__ import annotations

from typing import Any, Dict, Optional

__all__ = [
    "CamFileError",
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
    """Raised when a language model cannot be reached, refuses, or gives no usable clusters.

    Attributes:
        record: all questions and answers until then, or None.
        clusters: the last valid clusters, or None.
        answer: the answer that caused the error, or None.
    """

    def __init__(
        self, message: str, answer: Optional[str] = None, record: Optional[Dict[str, Any]] = None, clusters: Any = None
    ):
        super().__init__(message)
        self.answer, self.record, self.clusters = answer, record, clusters


class PromptFileError(SemplesError, ValueError):
    """A prompt file is damaged, foreign, or made for other classes or another CLIP."""


class CamFileError(SemplesError, ValueError):
    """A CAM or label file is damaged, of an unknown layout, or holds something other than numbers."""
