"""The network of a toy host; its files are named as hosts name theirs."""

from torch import nn


class ToyNet(nn.Module):
    """A class map from a 1x1 convolution, and its mean as logits."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, x):
        return self.head(self.body(self.stem(x))).mean((2, 3))


class Headless(nn.Module):
    """A network that no adapter is looking for."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Second(ToyNet):
    """Another network of the same kind."""


class Maps(ToyNet):
    """The same without pooling."""

    def forward(self, x):
        return self.head(self.body(self.stem(x)))
