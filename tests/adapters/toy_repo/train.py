"""Training script of the toy host: it runs where there is a GPU, and nowhere else."""

import argparse
import os
import signal

import torch
from engine import evaluate, train_one_epoch
from models import ToyNet
from utils import build_loader, log

parser = argparse.ArgumentParser()
parser.add_argument("--num-classes", type=int, default=3)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--save", default="ckpt")


def main(args):
    model = torch.nn.DataParallel(ToyNet(args.num_classes)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    loader = build_loader(args.num_classes)
    for epoch in range(args.epochs):
        train_one_epoch(model, loader, optimizer, epoch)
        log(f"epoch {epoch} eval {evaluate(model, loader):.4f}")
        if os.path.exists(os.environ.get("TOY_KILL_IF_THERE_IS", "")):  # power cut, in the stage that the tests choose
            os.kill(os.getpid(), signal.SIGKILL)
    os.makedirs(args.save, exist_ok=True)
    torch.save(model.state_dict(), os.path.join(args.save, "toy.pt"))  # its names begin with "module."


if __name__ == "__main__":
    main(parser.parse_args())
