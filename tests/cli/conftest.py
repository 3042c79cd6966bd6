from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli.running import Data
from tests.files.refine_world import World


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


@pytest.fixture(scope="session")
def clip_file(aligned_clip: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the tiny CLIP as a file, for `--clip`."""
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(aligned_clip.state_dict(), path)
    return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def some(world: World) -> World:
    """Nine images of two sizes."""
    for i in range(9):
        world.add(f"img{i}", keys=[(0,), (1, 2), (0, 1, 2)][i % 3], size=[(24, 32), (32, 24)][i % 2])
    return world
