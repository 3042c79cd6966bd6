"""Baselines that have no adapter of their own, through `generic`: python other_worker.py HOST REPO CLIP OUT.json

Run in a folder made by `Hosts.folder`. Writes what it saw as JSON; test_other_families.py judges it.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
import torch.nn.functional as F
import weights_worker  # of this folder
from torch import Tensor, nn
from worker_parts import photos, seed  # of this folder

from semples_plugin import PromptRefiner, adapters
from semples_plugin.adapters.runner import compat
from semples_plugin.class_names import VOC_CLASSES

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def difference(first: Tensor, second: Tensor) -> Dict[str, Any]:
    """Largest difference of two tensors, None if their shapes differ, and the largest value of the second."""
    same = first.shape == second.shape
    return {"difference": float((first - second).abs().max()) if same else None, "largest": float(second.abs().max())}


def reach(probe: adapters.Probe, model: nn.Module) -> Dict[str, Any]:
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    missed = [name for name in trainable if name not in probe.names]
    return {"verdict": probe.verdict, "reached": probe.names, "missed": missed, "frozen": frozen}


def compare(
    model: nn.Module, refiner: PromptRefiner, source: Any, step: Step, size: int, which: str = "first"
) -> Dict[str, Any]:
    """Two steps of a loop without, with, and again without the refiner, from the same weights and the same seed."""
    img, labels = photos(size, size, 2)
    start = copy.deepcopy(model.state_dict())
    captured: List[Tensor] = []
    inner = source.cam

    def keep(*parts: Any) -> Tensor:
        captured.append(inner(*parts))
        return captured[-1]

    source.cam = keep

    def loop() -> Dict[str, Any]:
        model.load_state_dict(start)
        model.train()
        seed()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses, first = [], {}
        for _ in range(2):
            optimizer.zero_grad()
            loss = step(model, img, labels)
            loss.backward()
            if not losses:
                first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            losses.append(loss.item())
            optimizer.step()
        return {"losses": losses, "first": first}

    plain = loop()
    terms: List[Dict[str, float]] = []
    on_step = lambda _, values: terms.append(values)  # noqa: E731
    with adapters.attach(source, model, refiner, on_step=on_step, forward_pass=which) as attachment:
        attached = loop()
    again = loop()
    model.load_state_dict(start)
    changes = [(attached["first"][name] - g).double().square().sum() for name, g in plain["first"].items()]
    sizes = [g.double().square().sum() for g in plain["first"].values()]
    return {
        "steps": attachment.steps,
        "plain losses": plain["losses"],
        "losses": attached["losses"],
        "terms": terms,
        "gradient difference": float((sum(changes) / sum(sizes)) ** 0.5),
        "same after": again["losses"] == plain["losses"]
        and all(torch.equal(again["first"][name], g) for name, g in plain["first"].items()),
        "captured": [list(cam.shape) for cam in captured],
        "first cam": captured[0].detach(),
    }


# ---------------------------------------------------------------------------------------------------- the baselines


def irn(refiner: PromptRefiner) -> Dict[str, Any]:
    """Its training step is run, unedited, by the runner; here the CAM and how far the loss reaches."""
    weights_worker.write()
    network = importlib.import_module("net.resnet50_cam")
    seed()
    model = network.Net()
    model.train()  # freezes conv1 and bn1
    options = {"features": "stage4", "classifier": "classifier", "image_stats": "imagenet"}
    img, labels = photos(96, 128, 2)
    probe = adapters.probe("generic", model, refiner, img, labels, **options)
    features: List[Tensor] = []
    with model.stage4.register_forward_hook(lambda module, inputs, output: features.append(output)):
        cam = adapters.cam_of("generic", model, **options)(img)
    its = network.CAM()
    its.load_state_dict(model.state_dict())
    with torch.no_grad():
        both = its(torch.stack([img[0], img[0].flip(-1)]))  # it adds the CAMs of an image and its mirror image
        rectified = adapters.cam_of("generic", model, activation="relu", **options)
        ours = rectified(img[:1])[0] + rectified(img[:1].flip(-1))[0].flip(-1)
        literal = F.conv2d(features[0], model.classifier.weight)
    return {"probe": reach(probe, model), "literal": difference(cam, literal), "inference": difference(ours, both)}


def seam(refiner: PromptRefiner) -> Dict[str, Any]:
    seed()
    model = importlib.import_module("network.resnet38_SEAM").Net()
    size = 64

    def step(model: nn.Module, img: Tensor, labels: Tensor) -> Tensor:
        """Two scales, a label loss for each, and that both agree."""
        small = F.interpolate(img, scale_factor=0.3, mode="bilinear", align_corners=True)
        pairs = [model(img), model(small)]
        targets = F.pad(labels, (1, 0), value=1.0)[:, :, None, None]
        losses = [F.multilabel_soft_margin_loss(cam.mean((2, 3), True)[:, 1:], targets[:, 1:]) for cam, _ in pairs]
        agree = (F.interpolate(pairs[0][1], pairs[1][1].shape[2:], mode="bilinear") - pairs[1][1]).abs().mean()
        return (losses[0] + losses[1]) / 2 + agree

    options = {"background_channel": True, "activation": "relu", "image_stats": "imagenet"}
    found: Dict[str, Any] = {}
    for which in ("first", "last"):
        function = adapters.make_source("generic", cam=lambda output, records: output[0], **options)
        found[which] = compare(model, refiner, function, step, size, which)
        del found[which]["first cam"]
    img, labels = photos(size, size, 2)
    found["probe"] = reach(adapters.probe("generic", model, refiner, img, labels, cam="fc8", **options), model)
    model.eval()
    with torch.no_grad():
        its = model(img)[0][:, 1:].relu()
        ours = adapters.cam_of("generic", model, cam=lambda output, records: output[0], **options)(img)
        fc8 = adapters.cam_of("generic", model, cam="fc8", background_channel=True)(img)
        enlarged = F.interpolate(fc8, (size, size), mode="bilinear", align_corners=True).relu()
    try:
        adapters.cam_of("generic", model, features="b7", classifier="fc8")(img)
        error = ""
    except adapters.HostError as hint:
        error = str(hint)
    return {**found, "output": difference(ours, its), "fc8": difference(enlarged, its), "error": error}


def toco(refiner: PromptRefiner) -> Dict[str, Any]:
    tools = importlib.import_module("utils.camutils")
    seed()
    network = importlib.import_module("model.model_seg_neg").network
    model = network("deit_tiny_patch16_224", num_classes=21, pretrained=False, init_momentum=0.9, aux_layer=-3)
    size, crops = 96, 4
    calls: List[str] = []

    def step(model: nn.Module, img: Tensor, labels: Tensor) -> Tensor:
        """Its classification part: CAMs of several scales without gradients, then the image and crops of it."""
        calls.clear()
        _, aux = tools.multi_scale_cam2(model, inputs=img, scales=(1.0, 0.5, 1.5))
        mask = tools.cam_to_roi_mask2(aux.detach(), cls_label=labels, low_thre=0.25, hig_thre=0.7)
        local, _ = tools.crop_from_roi_neg(images=img, roi_mask=mask, crop_num=crops, crop_size=32)
        calls.append("image")
        out = model(img, crops=[img, img.flip(-1), *local], n_iter=0)
        return F.multilabel_soft_margin_loss(out[0], labels) + F.multilabel_soft_margin_loss(out[3], labels)

    options = {"features": "encoder.norm", "classifier": "classifier", "patch_size": 16, "image_stats": "imagenet"}
    img, labels = photos(size, size, 2)
    with torch.no_grad():
        its = model(img, cam_only=True)[1]
    with model.encoder.norm.register_forward_hook(lambda *_: calls.append("norm")):
        found = compare(model, refiner, adapters.make_source("generic", **options), step, size)
    found["norm calls"] = calls[calls.index("image") :].count("norm")
    found["loop cam"] = difference(found.pop("first cam"), its)
    found["probe"] = reach(adapters.probe("generic", model, refiner, img, labels, **options), model)
    model.eval()
    wide, _ = photos(64, 128, 2)
    with torch.no_grad():
        found["wide cam"] = difference(adapters.cam_of("generic", model, **options)(wide), model(wide, cam_only=True)[1])
    return found


def main(name: str, repo: str, clip: str, out: str) -> None:
    sys.path.insert(0, repo)
    refiner = PromptRefiner(VOC_CLASSES, clip=clip, prompt_length=4)
    with compat.old_libraries(), compat.on_cpu():
        found = {"irn": irn, "seam": seam, "toco": toco}[name](refiner)
    Path(out).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
