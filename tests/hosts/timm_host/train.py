"""A plain training script around a network of timm: python train.py NETWORK PHOTOS LABELS.npy"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

name, photos, labels = sys.argv[1], Path(sys.argv[2]), np.load(sys.argv[3], allow_pickle=True).item()
ids = [path.stem for path in sorted((photos / "JPEGImages").glob("*.jpg")) if path.stem in labels][:4]


def photo(path):
    with Image.open(path) as file:
        values = np.asarray(file.convert("RGB").resize((96, 96)), np.float32) / 255
    return torch.from_numpy((values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1).float()


data = [(photo(photos / "JPEGImages" / f"{name}.jpg"), torch.as_tensor(labels[name]).float()) for name in ids]
options = {"img_size": 96} if name.startswith("vit") else {}
model = timm.create_model(name, pretrained=False, num_classes=20, **options).train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for img, target in DataLoader(data, batch_size=2):
    loss = F.multilabel_soft_margin_loss(model(img), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
