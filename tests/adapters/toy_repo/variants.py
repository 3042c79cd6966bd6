"""Training scripts that fail, or train in an unusual way: variants.py WHAT."""

import sys

import torch
import torch.nn.functional as F
from models import Headless, Maps, Second, ToyNet
from utils import build_loader

what = sys.argv[1]
loader = build_loader(3)
model = {"unknown": Headless, "pixels": Maps}.get(what, ToyNet)(3).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)


def step(img, target):
    logits = model(img.cuda())
    if what == "twice":  # a second scale, one backward pass for both
        logits = logits + model(F.interpolate(img.cuda(), scale_factor=0.5))
    if what == "no_loss":
        loss = (logits - target.cuda()).square().mean()
    else:
        loss = F.multilabel_soft_margin_loss(logits, target.cuda())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


model.train()
if what == "two":  # another network is trained after the first
    for network in (model, Second(3)):
        network.train()
        steps = torch.optim.SGD(network.parameters(), lr=0.05)
        for img, target in loader:
            loss = F.multilabel_soft_margin_loss(network(img), target)
            steps.zero_grad()
            loss.backward()
            steps.step()
    sys.exit()
if what == "pixels":  # no loss over classes; labels are in the batch alone
    for img, _ in loader:
        loss = F.cross_entropy(model(img), torch.zeros(len(img), 8, 8, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sys.exit()
if what == "swallow":  # endless data; any failure of the iterator counts as its end
    iterator = iter(loader)
    for _ in range(12):
        try:
            img, target = next(iterator)
        except:  # noqa: E722
            iterator = iter(loader)
            img, target = next(iterator)
        step(img, target)
    sys.exit()
for number, (img, target) in enumerate(loader):
    step(img, target)
    if number == 1 and what == "exit":
        sys.exit(3)
    if number == 1 and what == "raise":
        raise ZeroDivisionError("the host went wrong")
    if number == 1 and what == "interrupt":
        raise KeyboardInterrupt
