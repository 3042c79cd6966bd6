"""Loops of the toy host, with the device hard-coded."""

import torch
import torch.nn.functional as F
from utils import log


def train_one_epoch(model, loader, optimizer, epoch):
    model.train()
    for img, target in loader:
        img = img.cuda(non_blocking=True)
        target = target.cuda(non_blocking=True)
        loss = F.multilabel_soft_margin_loss(model(img), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        weight = model.module.head.weight.detach().double().sum().item()
        log(f"epoch {epoch} loss {loss.item():.4f} weight {weight:.9f}")


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    total = 0.0
    for img, target in loader:
        total += F.multilabel_soft_margin_loss(model(img.cuda()), target.cuda()).item()
    return total / len(loader)
