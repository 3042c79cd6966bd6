"""What the HTML pages share: templates of this folder, and pictures inside of a page, so that it loads nothing."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Optional

import numpy as np

__all__ = ["data_uri", "heat_map", "page_template"]


def page_template(name: str) -> Any:
    """A template of this folder.

    Raises:
        ModuleNotFoundError: if Jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A page needs Jinja2: pip install 'semples-plugin[cli]'.", name="jinja2") from error
    environment = jinja2.Environment(
        autoescape=True,  # class names, ids and prompts are text of others
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template(name)


def heat_map(photo: np.ndarray, cam: Optional[np.ndarray]) -> np.ndarray:
    """A CAM in [0, 1] as a heat map over the grey image."""
    import cv2

    grey = np.repeat(photo.mean(2, keepdims=True), 3, 2) * 0.55
    if cam is None:
        return grey.astype(np.uint8)
    heat = cv2.applyColorMap((np.clip(cam, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    weight = np.clip(cam, 0, 1)[..., None]
    return (grey * (1 - 0.75 * weight) + heat * 0.75 * weight).clip(0, 255).astype(np.uint8)


def data_uri(picture: np.ndarray, side: int = 320) -> str:
    """A picture as a JPEG inside of the page, at most `side` pixels high and wide."""
    import cv2

    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
