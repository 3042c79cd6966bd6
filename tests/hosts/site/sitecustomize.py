"""For processes of these tests, by PYTHONPATH: a torchvision wheel that was built for another torch can be imported.

Such a wheel fails on import ("operator torchvision::nms does not exist"). The baselines need its Python parts only, so its
operators are declared here; to call one fails as before.
"""

import importlib
import importlib.util
import sys

if importlib.util.find_spec("torchvision") is not None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torch

        LIBRARY = torch.library.Library("torchvision", "DEF")  # the declarations live as long as this object
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
