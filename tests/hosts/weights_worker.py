"""Random ImageNet weights where a baseline looks for the downloaded ones: python weights_worker.py irn REPO CLIP OUT.json"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from worker_parts import seed


def write() -> Path:
    """To $TORCH_HOME, here `torch` in the working folder."""
    seed()
    network = importlib.import_module("net.resnet50")
    weights = network.resnet50(pretrained=False, strides=(2, 2, 2, 1)).state_dict()
    for key in weights:
        if key.endswith("bn3.weight"):
            weights[key].fill_(0.2)  # the batch statistics are fixed at 0 and 1: keeps the sum of the branches small
    weights.update({"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    path = Path("torch/hub/checkpoints") / Path(network.model_urls["resnet50"]).name
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    return path


def main(name: str, repo: str, clip: str, out: str) -> None:
    sys.path.insert(0, repo)
    path = write()
    Path(out).write_text(json.dumps({"path": str(path.resolve())}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
