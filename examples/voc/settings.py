"""What one run of the chain is asked for. Flow: `__main__` -> **settings** -> `commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from semples_plugin.adapters.runner.record import commit
from semples_plugin.config import config_for, parse_assignments

from .datasets import DataSet
from .segmentation import Training

SCALES = ("1.0", "0.75", "1.25")  # the host's own
EPOCHS, INPUT_SIZE = 45, 448  # the host's own
ALONE, AREA = "alone", "area"  # the controls: the host with nothing attached, and with the area term only
START = "start"  # the host that all others start from, trained with nothing attached


class Settings(NamedTuple):
    """What one run is asked for; paths are absolute.

    Attributes:
        data: the data set.
        out: folder of the run.
        clip: name or file of the CLIP, None for random weights.
        finetune: file of the weights that the host starts from, None to download them.
        checkpoint: a trained host that match and refine start from, or None.
        python: interpreter of the host's environment.
        seeds: number of seeds.
        gpus: number of GPUs; with `cpu` 0.
        cpu: run the host, whose calls of the GPU are hard-coded, without one.
        rehearsal: tiny sizes and random weights.
        limit: images of each list, None for all.
        host_first: train the host alone, and start all trainings from it.
        mode: "add" to the host's label loss, or "replace" it.
        host_arguments: of the host's training script, after the chain's; not for the host that the others start from.
        epochs, input_size, batch_size: of the host, None for its own.
        refiner: options of the refiner, NAME=VALUE.
        online: steps over which the prompts join, for one training that learns them along the way; None for three stages.
        controls: take the host alone to the end of the chain too, and the area term alone.
        threshold: background score of the masks.
        low, high: background scores of the pseudo labels.
        segmenter: name or folder of the SegFormer.
        training: how it is trained.
        use_crf: whether a dense CRF is run.
        processes: that refine CAM files side by side.
        tflops: assumed speed of a GPU, for estimates.
    """

    data: DataSet
    out: Path
    clip: Optional[str] = "ViT-B/32"
    finetune: Optional[Path] = None
    checkpoint: Optional[Path] = None
    python: str = "python"
    seeds: int = 1
    gpus: int = 1
    cpu: bool = False
    rehearsal: bool = False
    limit: Optional[int] = None
    host_first: bool = False
    mode: str = "add"
    host_arguments: Tuple[str, ...] = ()
    epochs: Optional[int] = None
    input_size: Optional[int] = None
    batch_size: Optional[int] = None
    refiner: Tuple[str, ...] = ()
    online: Optional[int] = None
    controls: bool = False
    threshold: float = 0.4
    low: float = 0.3
    high: float = 0.5
    segmenter: str = "nvidia/mit-b2"
    training: Training = Training()
    use_crf: bool = False
    processes: int = 1
    tflops: float = 10.0

    @property
    def pretrained(self) -> bool:
        """Whether the host starts from DeiT-S: it can double the grid of its positions, but not more."""
        return self.input_size in (None, INPUT_SIZE)

    @property
    def area_weight(self) -> float:
        """Weight of the area term."""
        default = config_for(self.data.option).lambda_area
        return float(parse_assignments("--set", self.refiner).get("lambda_area", default))

    @property
    def runs(self) -> List[str]:
        """What is trained with every seed: the method, "", and the controls. Without a weight the area term is no control."""
        return ["", ALONE, *([AREA] if self.controls and self.area_weight else [])]

    def _start(self) -> str:
        """What match and refine start from, in words."""
        if self.checkpoint is not None:
            return str(self.checkpoint)
        weights = "DeiT-S" if self.pretrained and not self.rehearsal else "random weights"
        return f"{weights}, then its own training with nothing attached" if self.host_first else weights

    def facts(self) -> Dict[str, Any]:
        """What the ledger says about a run."""
        return {
            "rehearsal": self.rehearsal,
            "seeds": self.seeds,
            "gpus": self.gpus,
            "data_set": self.data.name,
            "data": str(self.data.root),
            "host": "MCTformer+",
            "host_commit": commit(self.data.repo) if self.data.repo.is_dir() else None,
            "clip": self.clip or "random weights",
            "start": self._start(),
            "mode": self.mode,
            "host_arguments": list(self.host_arguments),
            "host_epochs": self.epochs or EPOCHS,
            "input_size": self.input_size or INPUT_SIZE,
            "refiner": list(self.refiner),
            "online_steps": self.online,
            "controls": self.controls,
            "area_weight": self.area_weight,
            "scales": [float(scale) for scale in SCALES],
            "threshold": self.threshold,
            "label_thresholds": [self.low, self.high],
            "segmenter": "random weights" if self.rehearsal else self.segmenter,
            "steps": self.training.steps,
            "batch_size": self.training.batch_size,
            "crf": self.use_crf,
        }
