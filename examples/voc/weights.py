"""Weights: CLIP, what the host starts from, the segmentation network; or random ones for a rehearsal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Dict

import torch

from semples_plugin.clip_backends import load_clip, openai_clip_module

from .chain import ChainError, sha256, write_json
from .segmentation import load_network, random_network, save_network
from .settings import Settings

DEIT = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"  # what the host's run_mct_plus.sh starts from
DEIT_HASH = "cd65a155"  # beginning of its SHA-256, part of its name


def hub_file(folder: Path) -> Path:
    """Where the host, with TORCH_HOME set to `folder/torch`, finds its start instead of downloading it."""
    return folder / "torch" / "hub" / "checkpoints" / DEIT.rpartition("/")[2]


def get_weights(settings: Settings, folder: Path) -> None:
    """Put all weights into a folder: `segmenter/`, the host's start, `clip.pt` in a rehearsal, and `weights.json` about them.

    Raises:
        ChainError: if one could not be downloaded.
    """
    hub, labels = hub_file(folder), 1 + len(settings.data.classes)
    hub.parent.mkdir(parents=True, exist_ok=True)
    given = {"clip": settings.clip, "checkpoint": settings.checkpoint}
    hashes = {name: sha256(Path(path)) for name, path in given.items() if path is not None and Path(path).is_file()}
    if settings.rehearsal:
        torch.manual_seed(0)
        torch.save(random_clip().state_dict(), folder / "clip.pt")
        torch.save({"model": random_deit()}, hub)
        network, hashes["clip"] = random_network(labels), sha256(folder / "clip.pt")
    else:
        _fetch_deit(settings, hub)
        if settings.clip is not None and "clip" not in hashes:
            load_clip(settings.clip, "cpu")  # downloads it once and checks it
        try:
            network = load_network(settings.segmenter, labels)
        except OSError as error:
            raise ChainError(
                f"The SegFormer {settings.segmenter} could not be loaded ({error}). Give a folder: --segmenter DIR."
            ) from error
    save_network(network, folder / "segmenter")
    hashes["finetune"] = sha256(hub)
    names = {"clip": settings.clip or "random weights", "segmenter": settings.segmenter, "finetune": DEIT}
    write_json(folder / "weights.json", {"random": settings.rehearsal, "names": names, "sha256": hashes})


def _fetch_deit(settings: Settings, target: Path) -> None:
    if settings.finetune is not None:
        shutil.copyfile(settings.finetune, target)
        return
    try:
        torch.hub.download_url_to_file(DEIT, str(target), hash_prefix=DEIT_HASH, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        raise ChainError(f"{DEIT} could not be downloaded ({error}). Give the file: --finetune FILE.") from error


def random_clip() -> torch.nn.Module:
    """A tiny CLIP in OpenAI's layout with random weights, for rehearsals."""
    return openai_clip_module("model").CLIP(32, 64, 2, 64, 16, 77, 49408, 64, 1, 2).eval()


def random_deit() -> Dict[str, torch.Tensor]:
    """Those tensors of DeiT-S that the host reshapes before it loads the rest, with random values."""
    return {"pos_embed": 0.02 * torch.randn(1, 197, 384), "cls_token": 0.02 * torch.randn(1, 1, 384)}
