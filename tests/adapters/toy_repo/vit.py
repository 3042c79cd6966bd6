"""A transformer of the toy host: `vit.py train` trains it, `vit.py infer WEIGHTS` writes its CAM of every image to cams.pt."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from utils import Photos, build_loader


class Embed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patch_size = (8, 8)
        self.proj = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.proj((3 * q @ k.transpose(1, 2)).softmax(-1) @ v)


class ToyViT(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.embed_dim = width
        self.patch_embed = Embed(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x, return_cam=False):
        tokens = self.blocks(self.patch_embed(x))
        cam = self.head(tokens.transpose(1, 2).reshape(len(x), -1, x.shape[2] // 8, x.shape[3] // 8))
        return cam if return_cam else cam.mean((2, 3))


model = ToyViT(3)
if sys.argv[1] == "train":
    model.cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for img, target in build_loader(3):
        loss = F.multilabel_soft_margin_loss(model(img.cuda()), target.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
else:
    model.load_state_dict(torch.load(sys.argv[2])["model"])
    model.cuda().eval()
    with torch.no_grad():
        torch.save(torch.cat([model(img[None], return_cam=True) for img, _ in Photos(3)]), "cams.pt")
