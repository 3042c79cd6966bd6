"""CAM files of the toy host, one dict class -> map per image."""

import argparse
import os

import numpy as np
import torch
from models import ToyNet
from utils import Photos

parser = argparse.ArgumentParser()
parser.add_argument("--weights")
parser.add_argument("--cam-out", default="cams")
args = parser.parse_args()

model = ToyNet(3)
model.load_state_dict(torch.load(args.weights, map_location="cuda")["model"])
model.cuda().eval()
os.makedirs(args.cam_out, exist_ok=True)
for i, (img, label) in enumerate(Photos(3)):
    with torch.no_grad():
        cam = model.head(model.body(model.stem(img[None].cuda())))[0]
    found = {k: cam[k].cpu().numpy() for k in label.nonzero().flatten().tolist()}
    np.save(os.path.join(args.cam_out, f"{i}.npy"), found)
