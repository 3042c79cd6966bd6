"""Tasks for the tests of worker processes, which import them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Optional, Tuple

from semples_plugin.errors import CamFileError


def scaled(shared: int, value: int) -> Tuple[int, int]:
    time.sleep(0.1)  # so that the other worker gets something to do
    return shared * value, os.getpid()


def threads(_: Any) -> Tuple[int, int]:
    import cv2
    import torch

    return torch.get_num_threads(), cv2.getNumThreads()


def fail(_: Any) -> None:
    raise CamFileError("a reason")


def unsendable(_: Any) -> Any:
    return lambda: None


def die(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(_: Any, seconds: float, pid: Optional[Path] = None) -> None:
    if pid is not None:
        pid.write_text(str(os.getpid()))
    time.sleep(seconds)
