"""CLIP-guided background prompts for weakly-supervised segmentation, as an add-on to the pipeline you have.

    refiner = PromptRefiner(classes)                 # CLIP ViT-B/32, frozen
    loss = loss + refiner(img, cam, labels)          # in your training step
    masks, pseudo_labels = refiner.refine_masks(img, cam, labels)

Importing this package imports torch and numpy, nothing else.
"""

from .config import COCO, VOC, RefinerConfig
from .errors import ClipError, DetachedCamError, PromptFileError, SemplesError
from .refiner import PromptRefiner

__version__ = "0.1.0"
__all__ = ["COCO", "VOC", "ClipError", "DetachedCamError", "PromptFileError", "PromptRefiner", "RefinerConfig", "SemplesError"]
