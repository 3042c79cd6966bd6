"""`attach` around the loops of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from semples_plugin import PromptRefiner, adapters
from tests.adapters.test_any_host import cam
from tests.adapters.toy_hosts import CLASSES, ToyCNN, make_loader

CNN = {"features": "body", "classifier": "fc"}
DATA = [(x, y) for img, labels in make_loader(3) for x, y in zip(img, labels)]


@pytest.fixture
def refiner(make_refiner: Callable[..., PromptRefiner]) -> PromptRefiner:
    return make_refiner(CLASSES, image_stats="imagenet")


@pytest.mark.filterwarnings("ignore")
def test_lightning(refiner: PromptRefiner, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ToyCNN()
            self.losses: List[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.multilabel_soft_margin_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(module: Module, **options: Any) -> None:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(DATA, batch_size=2))

    module = Module()
    fit(module)
    plain = module.losses
    module.losses = []
    expected = [refiner(img, cam(module.net, img), labels).item() for img, labels in make_loader(3)]
    with adapters.attach("generic", module.net, refiner, **CNN) as attached:
        fit(module, accumulate_grad_batches=2)
    assert attached.steps == 3
    assert module.losses == pytest.approx([a + b for a, b in zip(plain, expected)], rel=1e-4)
    with adapters.attach("generic", None, refiner, **CNN) as attached:  # the module's own name is not the network's
        fit(module)
    assert attached.steps == 3 and attached.model is module.net


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer(refiner: PromptRefiner, tmp_path: Path) -> None:
    """A ViT of transformers: its loss is computed inside its forward, on a linear layer over the class token."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        num_labels=3, problem_type="multi_label_classification",
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)

    def collate(items: List[Any]) -> Dict[str, Tensor]:
        return {"pixel_values": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}

    def train(scheduled: float) -> List[float]:
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=scheduled, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=DATA, data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = train(0.0)
    where = {"features": "vit.layernorm", "classifier": "classifier", "patch_size": 8}
    terms: List[float] = []
    with adapters.attach("generic", model, refiner, on_step=lambda _, found: terms.append(found["loss"]), **where) as attached:
        seen = train(0.0)
    assert attached.steps == 3 and attached.cam_shapes == [(2, 3, 4, 4)]
    assert seen == pytest.approx([a + b for a, b in zip(plain, terms)], rel=1e-3)
    with adapters.attach("generic", None, refiner, **where) as attached:
        train(0.0)
    assert attached.steps == 3 and isinstance(attached.model, nn.Module)
