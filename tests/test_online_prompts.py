"""Prompts that are learned along the way: the step against a literal one, the ramp, resuming, and several processes."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semples_plugin import VOC, PromptRefiner
from semples_plugin.online_prompts import ramp

CLASSES = ["boat", "train", "bird"]


@pytest.fixture
def online(make_refiner: Any) -> Any:
    return lambda **options: make_refiner(online_steps=4, prompt_length=4, lambda_refine=2.0, **options)


def step(refiner: PromptRefiner, make_batch: Any, **options: Any) -> Any:
    img, cam, labels = make_batch(**options)
    return refiner.compute(img, cam.requires_grad_(), labels), (img, cam, labels)


def test_the_ramp() -> None:
    assert ramp(0, 10) == pytest.approx(math.exp(-5)) and ramp(5, 10) == pytest.approx(math.exp(-1.25))
    assert ramp(10, 10) == ramp(1000, 10) == 1.0


def test_a_step_is_one_of_adamw_on_the_prompt_loss_of_the_batch(online: Any, make_batch: Any) -> None:
    refiner = online(lambda_t=0.3)
    before = refiner.prompts.context.detach().clone()
    out, (img, cam, labels) = step(refiner, make_batch)
    eps = refiner.config.eps
    features, pairs = (lambda r: r.encode_backgrounds(img, cam.detach(), labels))(
        PromptRefiner(CLASSES, refiner.encoder, refiner.config.replace(online_steps=None, prompt_eps=eps))
    )
    context = nn.Parameter(before.clone())
    optimizer = torch.optim.AdamW([context], lr=refiner.config.prompt_lr, weight_decay=refiner.config.weight_decay)
    total = torch.zeros(())
    for v_b, (_, k) in zip(features, pairs.tolist()):  # a literal loop over pairs
        u_b = refiner.encoder.encode_prompt(context[k], refiner.config.prompt_template)[0]
        near = F.cosine_similarity(v_b, u_b, dim=0)
        pull = -torch.log(near.clamp(1e-4, 0.9999)) + (1e-4 - near).clamp(min=0)
        push = F.cosine_similarity(refiner.text_features[k], u_b, dim=0).clamp(1e-4, 0.9999).log()
        total = total + (pull + 0.3 * push) / len(pairs)
    total.backward()
    optimizer.step()
    assert not torch.equal(refiner.prompts.context, before)
    torch.testing.assert_close(refiner.prompts.context, context.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.terms["prompt"], total.detach(), atol=1e-5, rtol=0)


def test_the_hosts_loss_takes_the_prompts_of_before_the_step_and_lambda_of_the_ramp(online: Any, make_batch: Any) -> None:
    refiner = online()
    for number in range(6):
        before = copy.deepcopy(refiner.prompts.context.detach())
        out, (img, cam, labels) = step(refiner, make_batch)
        literal = PromptRefiner(CLASSES, refiner.encoder, refiner.config.replace(online_steps=None))
        literal.prompts.take(before, refiner.prompts.alive)
        expected = literal.compute(img, cam, labels)
        factor = math.exp(-5 * (1 - min(number / 4, 1)) ** 2)
        match = out.terms["match_foreground"] + refiner.config.lambda_b * out.terms["match_background"]
        torch.testing.assert_close(out.terms["refine"], expected.terms["refine"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.loss, match + factor * 2.0 * out.terms["refine"], atol=1e-5, rtol=1e-5)


def test_prompts_come_alive_and_can_be_read_and_saved(online: Any, make_batch: Any, tmp_path: Path) -> None:
    refiner = online(prompt_lr=0.1)
    assert refiner.stage == "match"
    img, cam, labels = make_batch()
    labels[:, 2] = 0  # no bird anywhere
    for _ in range(60):
        refiner(img, cam.requires_grad_(), labels)
    assert refiner.stage == "refine"
    assert refiner.prompts.alive[:, 0].tolist() == [True, True, False]
    assert refiner.online_prompts.num_pairs[2] == 0 and refiner.online_prompts.num_pairs[0] == 60 * labels[:, 0].sum()
    assert [words.alive for words in refiner.nearest_words(["rails", "water"])] == [True, True, False]
    refiner.save(tmp_path / "prompts.safetensors")
    other = PromptRefiner.load(tmp_path / "prompts.safetensors", clip=refiner.encoder)
    assert other.config.online_steps == 4
    torch.testing.assert_close(other.prompts.context, refiner.prompts.context)


def test_only_training_steps_move_the_prompts(online: Any, make_batch: Any) -> None:
    refiner = online()
    img, cam, labels = make_batch()
    before = refiner.prompts.context.detach().clone()
    with torch.no_grad():
        refiner.compute(img, cam, labels)
    refiner.compute(img, cam.detach(), labels)
    refiner.refine_masks(img, cam, labels, clip_steps=1)
    refiner.optimize_cam(img, cam, labels, steps=1)
    assert torch.equal(refiner.prompts.context, before) and refiner.online_prompts.steps == 0
    refiner(img, cam.requires_grad_(), labels)
    assert refiner.online_prompts.steps == 1 and refiner.prompts.context.grad is None


def test_a_batch_without_positives_counts_as_a_step_and_changes_no_prompt(online: Any, make_batch: Any) -> None:
    refiner = online()
    img, cam, labels = make_batch()
    before = refiner.prompts.context.detach().clone()
    loss = refiner(img, cam.requires_grad_(), torch.zeros_like(labels))
    loss.backward()
    assert loss.item() == 0 and torch.equal(refiner.prompts.context, before) and refiner.online_prompts.steps == 1
    assert refiner.stage == "match"


def test_a_run_that_is_taken_up_again_goes_on_exactly(online: Any, make_batch: Any, tmp_path: Path) -> None:
    whole, first = online(), online()
    batches = [make_batch(seed=seed) for seed in range(6)]
    losses = [whole(img, cam.requires_grad_(), labels).item() for img, cam, labels in batches]
    for img, cam, labels in batches[:3]:
        first(img, cam.requires_grad_(), labels)
    torch.save(first.state_dict(), tmp_path / "refiner.pt")
    second = online()
    second.load_state_dict(torch.load(tmp_path / "refiner.pt", weights_only=True))
    assert [second(img, cam.requires_grad_(), labels).item() for img, cam, labels in batches[3:]] == losses[3:]
    assert torch.equal(second.prompts.context, whole.prompts.context)


def test_a_step_encodes_the_prompts_of_the_batchs_classes_once(
    online: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner = online()
    img, cam, labels = make_batch()
    labels[:, 1:] = 0
    refiner(img, cam.requires_grad_(), labels)  # the empty prompt is encoded in the first step only
    sizes, encode = [], refiner.encoder.encode_prompt
    monkeypatch.setattr(refiner.encoder, "encode_prompt", lambda c, t: sizes.append(len(c)) or encode(c, t))
    refiner(img, cam.requires_grad_(), labels)
    assert sizes == [1]


def test_several_prompts_per_class_are_refused() -> None:
    with pytest.raises(ValueError, match="`online_steps` learns one prompt per class.*got prompts_per_class=2"):
        VOC.replace(online_steps=10, prompts_per_class=2)


def test_clusters_are_repelled(online: Any, make_batch: Any) -> None:
    """With clusters of one class each it is the same as without."""
    plain, single = online(), online(clusters={name: [name] for name in CLASSES})
    both = online(clusters={"all": CLASSES})
    for refiner in (plain, single, both):
        step(refiner, make_batch)
    torch.testing.assert_close(plain.prompts.context, single.prompts.context)
    assert not torch.equal(plain.prompts.context, both.prompts.context)


WORKER = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import openai_clip_module
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
torch.manual_seed(0)
clip = openai_clip_module("model").CLIP(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2)
refiner = PromptRefiner(["boat", "train", "bird"], clip=clip, image_stats=None, prompt_length=4, online_steps=3)
generator = torch.Generator().manual_seed(1)
for number in range(4):
    img, cam = torch.rand(5, 3, 32, 32, generator=generator), torch.rand(5, 3, 8, 8, generator=generator)
    labels = (torch.rand(5, 3, generator=generator) < 0.5).long()
    labels[3:] = 0 if number == 1 else labels[3:]  # in this step the second process has no positive label
    own = slice(None) if size == 1 else slice(0, 3) if rank == 0 else slice(3, 5)  # shares of unequal size
    refiner(img[own], cam[own].requires_grad_(), labels[own])
online = refiner.online_prompts
torch.save({"context": refiner.prompts.context.detach(), "alive": refiner.prompts.alive,
            "similarity": online.similarity, "steps": online.steps}, f"{folder}/{size}.{rank}.pt")
"""


def test_two_processes_learn_the_prompts_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(size), str(tmp_path)], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank, size in ((0, 1), (0, 2), (1, 2))
    ]  # fmt: skip
    try:
        errors = [run.communicate(timeout=120)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(errors)
    one, *two = (torch.load(tmp_path / name) for name in ("1.0.pt", "2.0.pt", "2.1.pt"))  # type: Dict[str, Any]
    for found in two:
        assert found["steps"] == one["steps"] == 4 and torch.equal(found["alive"], one["alive"])
        torch.testing.assert_close(found["context"], one["context"], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["similarity"], one["similarity"], atol=1e-5, rtol=0)
    assert torch.equal(two[0]["context"], two[1]["context"])
