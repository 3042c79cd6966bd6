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
    "MissingLibraryError",
    "PromptFileError",
    "SamError",
    "SemplesError",
    "WorkerError",
]


class SemplesError(Exception):
    """Base of all errors that are particular to this package. Wrong arguments raise plain TypeError or ValueError."""


class CamFileError(SemplesError, ValueError):
    """Raised when a CAM, label or image file is damaged, has an unknown layout, or holds something other than numbers."""


class ClipError(SemplesError, RuntimeError):
    """Raised when a CLIP model is missing, cannot be read, or is not of a kind that can be used."""


class ClusterError(SemplesError, ValueError):
    """Raised when category clusters are no partition of the classes, or their file cannot be read."""


class DetachedCamError(SemplesError, ValueError):
    """Raised when the CAM is cut off from the host's graph, so that a loss on it would train nothing."""


class HostError(SemplesError, RuntimeError):
    """Raised when a host network is not of the expected kind, or did not run as it should have."""


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


class MissingLibraryError(SemplesError, ModuleNotFoundError):
    """Raised when an optional library is not installed; the message says what to install."""


class PromptFileError(SemplesError, ValueError):
    """Raised when a prompt file is damaged or foreign, or was made for other classes or another CLIP."""


class SamError(SemplesError, RuntimeError):
    """Raised when a Segment Anything model cannot be loaded."""


class WorkerError(SemplesError, RuntimeError):
    """Raised when a worker process of `semples refine --workers` was killed."""
