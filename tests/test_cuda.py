"""The refiner on a GPU, in every precision a training loop may use; skipped where there is none."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(batch: Any) -> Any:
    img, cam, labels = batch
    return img.cuda(), cam.detach().cuda().requires_grad_(True), labels.cuda()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_loss_and_gradient_equal_those_of_the_cpu(autocast: Optional[torch.dtype], make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(learned=True), make_batch()
    expected = refiner(img, cam, labels)
    expected.backward()
    gpu = on_gpu((img, cam, labels))
    with torch.autocast("cuda", dtype=autocast or torch.float16, enabled=autocast is not None):
        loss = refiner(*gpu)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.is_cuda
    tolerance = 1e-3 if autocast is None else 5e-2
    assert torch.allclose(loss.cpu(), expected, rtol=tolerance)
    assert (gpu[1].grad.cpu() - cam.grad).norm() < 4 * tolerance * cam.grad.norm()


def test_the_stages_run_on_the_device_of_the_cam(make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(), on_gpu(make_batch())
    fit = refiner.fit_prompts([(img.cpu(), labels.cpu())], lambda x: cam.detach(), epochs=3, progress=False)
    assert refiner.prompts.context.is_cuda and fit.losses[-1] < fit.losses[0]
    result = refiner.refine_masks(img, cam, labels, suppress=True)
    assert result.masks.is_cuda and result.masks.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clip_in_lower_precision(dtype: torch.dtype, make_refiner: Any, make_batch: Any) -> None:
    batch = on_gpu(make_batch())
    expected, got = make_refiner()(*batch), make_refiner(clip_dtype=dtype)(*batch)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=5e-2)


def test_a_cam_on_another_device_than_the_image(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    with pytest.raises(ValueError, match="must be on one device; got `img` on cpu, `cam` on cuda:0"):
        make_refiner()(img, cam.cuda(), labels)


def test_a_check_on_the_gpu_finds_what_it_finds_on_the_cpu(make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(learned=True, class_weights={"boat": 0.5}), make_batch()
    found = []
    for device in ("cpu", "cuda"):
        report = refiner.check([(img, labels)], lambda _, device=device: cam.detach().to(device), progress=False)
        found.append([pair.losses["cam"] for pair in report.pairs])
    assert refiner.device.type == "cuda" and found[0] == pytest.approx(found[1], rel=1e-3)
