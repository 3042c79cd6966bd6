from __future__ import annotations

from pathlib import Path

import pytest

from tests.files.refine_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def some(world: World) -> World:
    """Nine images of two sizes."""
    for i in range(9):
        world.add(f"img{i}", keys=[(0,), (1, 2), (0, 1, 2)][i % 3], size=[(24, 32), (32, 24)][i % 2])
    return world
