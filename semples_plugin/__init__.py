"""CLIP-guided background prompts for weakly-supervised segmentation, as an add-on to the pipeline you have.

    refiner = PromptRefiner(classes)                 # CLIP ViT-B/32, frozen
    loss = loss + refiner(img, cam, labels)          # in your training step
    masks, pseudo = refiner.refine(img, cam, labels)

Importing this package imports torch and numpy, nothing else.
"""

from .errors import ClipError, DetachedCamError, PromptFileError, SemplesError
from .refiner import COCO, VOC, PromptRefiner, Recipe

__version__ = "0.1.0"
__all__ = ["COCO", "VOC", "ClipError", "DetachedCamError", "PromptFileError", "PromptRefiner", "Recipe", "SemplesError"]
