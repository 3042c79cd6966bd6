"""`PromptRefiner`: the one module that people build. It holds the prompts, the text features and a frozen CLIP.

Flow of a step: img, cam, labels -> `regions` -> `views` -> `clip_encoder` -> `terms` -> one scalar. The module is a thin
shell: the mathematics is in the functions of those files, the options are in `config`.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from . import checking, masks, prompt_learning, prompts, regions, terms, views
from ._checks import check_batch, check_classes, check_known, check_number, check_stats, warn
from ._files import PathLike
from .check_report import CheckReport
from .clip_backends import load_clip, published_clips
from .clip_encoder import ClipEncoder
from .config import VOC, RefinerConfig
from .errors import ClipError, DetachedCamError, PromptFileError
from .online_prompts import OnlinePrompts
from .prompt_files import PromptFile, check_fits, read_file, write_file
from .prompt_learning import PromptFit
from .prompts import BackgroundPrompts, NearestWords

__all__ = ["PromptRefiner", "RefinerOutput"]

PromptsOfPairs = Tuple[Tensor, Tensor]  # u_b (P, N, D), and which are in use (P, N)


class RefinerOutput(NamedTuple):
    """What `PromptRefiner.compute` returns.

    Attributes:
        loss: scalar, float32, attached to `cam`.
        terms: the unweighted terms by name: match_foreground, match_background, and, where they apply, refine,
            background_texts, area.
        masks: (P, S, S) normalized CAM of every positive pair at CLIP's input size, in [0, 1].
        pairs: (P, 2) image and class index of each of these masks.
    """

    loss: Tensor
    terms: Dict[str, Tensor]
    masks: Tensor
    pairs: Tensor


class PromptRefiner(nn.Module):
    """CLIP-aligned losses and masks for any model's class activation maps (SemPLeS, arXiv 2401.11791).

    Three stages: (a) before prompts exist the loss is L_match; (b) `fit_prompts` learns the background prompts with the host
    frozen; (c) from then on the loss is L_match + lambda L_refine.

        L_match  = < -log c(v_f, u_f) > + lambda_b < -log(1 - c(v_b, u_f)) >
        L_refine = < -log(1 - c(v_f, u_b)) >

    where v_f, v_b: CLIP features of the region inside the CAM and of the rest; u_f: text feature of the class;
    u_b: feature of its learned background prompt; c: cosine clamped to [1e-4, 0.9999]; < >: mean over positive pairs (with
    several processes: each over its own).

    The CLIP model is frozen and is not in `parameters()` or `state_dict()`. The module follows the device of `cam`.

    Args:
        classes: C class names, or a mapping class name -> name to prompt CLIP with (`{"person": "player", ...}`).
        clip: `"ViT-B/32"` and the like, a weights file, a loaded model of OpenAI's `clip`, open_clip or transformers,
            `"open_clip:<architecture>/<tag or file>"` or `"hf:<name or folder>"`; see `semples_plugin.clip_backends.load_clip`.
        config: a `RefinerConfig`: all options. `VOC` and `COCO` hold the published numbers.
        **overrides: options of `RefinerConfig` by name, such as `lambda_area=1.0` or `image_stats=None`.

    Attributes:
        classes: the C class names.
        config: the configuration with the overrides.

    Raises:
        TypeError, ValueError: for wrong arguments; the message says what to do.
        ClipError: if the CLIP model cannot be loaded or used.

    Example:
        >>> refiner = PromptRefiner(["boat", "train"], clip=tiny_clip, image_stats=None)
        >>> img, labels = torch.rand(2, 3, 32, 32), torch.tensor([[1, 0], [1, 1]])
        >>> cam = torch.rand(2, 2, 8, 8, requires_grad=True)  # your model's class activation maps
        >>> loss = refiner(img, cam, labels)
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
        >>> sorted(refiner.compute(img, cam, labels).terms)
        ['match_background', 'match_foreground']
    """

    text_features: Tensor
    background_features: Tensor
    _background_owner: Tensor

    def __init__(
        self,
        classes: Union[Sequence[str], Mapping[str, str]],
        clip: Union[str, "os.PathLike[str]", nn.Module, ClipEncoder] = "ViT-B/32",
        config: RefinerConfig = VOC,
        **overrides: Any,
    ):
        super().__init__()
        self.classes, self.prompt_names = check_classes(classes)
        if not isinstance(config, RefinerConfig):
            raise TypeError(f"`config` must be a RefinerConfig such as VOC or COCO; got {config!r}.")
        self.config = config = config.replace(**overrides)
        self.image_stats = check_stats(config.image_stats)
        check_known("class_weights", config.class_weights or (), self.classes)
        background_texts, owner = prompts.hand_written_prompts(config.background_texts, self.classes)
        self._related = None if config.clusters is None else prompts.related_classes(config.clusters, self.classes)  # (C, C)
        # Ordinary tensors also where the caller runs under inference mode, so that the loss can be differentiated later.
        with torch.inference_mode(False), torch.no_grad():
            # A plain object: not registered, not saved, not trained.
            self._encoder = load_clip(clip, dtype=getattr(torch, str(config.clip_dtype)))
            longest = self._encoder.max_prompt_length(config.prompt_template)
            if not 1 <= config.prompt_length <= longest:
                raise ValueError(
                    f"`prompt_length` must be from 1 to {longest}, what CLIP's {self._encoder.context_length} tokens leave in "
                    f"the layout {config.prompt_template!r}; got {config.prompt_length}."
                )
            context_dim = self._encoder.context_dim
            per_class = config.prompts_per_class
            self.prompts = BackgroundPrompts(len(self.classes), config.prompt_length, context_dim, config.seed, per_class)
            texts = [config.text_template.replace("{}", name) for name in self.prompt_names]
            self.register_buffer("text_features", self._encoder.encode_text(texts), persistent=False)  # (C, D)
            self.register_buffer("background_features", self._encoder.encode_text(background_texts), persistent=False)  # (K, D)
            self.register_buffer("_background_owner", owner, persistent=False)  # (C, K)
            self.online_prompts = OnlinePrompts(len(self.classes)) if config.online_steps else None
            self._pairs_seen = 0  # numbers the levels at which masks are cut, see `regions.cut_levels`
            self._prompt_cache: Optional[Tuple[Tensor, int, torch.device, Tensor]] = None
            self.to(self._encoder.device)

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, img: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """The loss of the current stage, to be added to the host's own.

        Args:
            img: (B, 3, H, W) the batch as the host sees it (statistics as in `config.image_stats`).
            cam: (B, C, h, w) raw class activation maps, attached to the host's graph; any resolution and range.
            labels: (B, C) image-level labels, multi-hot.

        Returns:
            Scalar, float32. A batch without any positive label gives a zero that is still attached to `cam`.

        Raises:
            DetachedCamError: if `cam` does not require grad while gradients are on.
            TypeError, ValueError: for a batch of the wrong kind, shape or range.
        """
        if torch.is_grad_enabled() and isinstance(cam, Tensor) and cam.is_floating_point() and not cam.requires_grad:
            raise DetachedCamError(
                "`cam` must require grad; got a tensor that is cut off from the host's graph, so the loss cannot train the "
                "host. Capture it without detach() and outside no_grad(); to only look at the terms, call compute(...)."
            )
        return self.compute(img, cam, labels).loss

    def compute(self, img: Tensor, cam: Tensor, labels: Tensor) -> RefinerOutput:
        """Loss, named terms and masks of one batch; arguments as for `forward`.

        Exactly two image encodes per positive pair and no text encode: v_f serves L_match and L_refine, u_f and u_b are
        cached.
        """
        if getattr(self, "_is_replica", False):  # threads would move the one CLIP between devices
            raise RuntimeError(
                "PromptRefiner cannot run inside torch.nn.DataParallel; wrap your network alone and call the refiner on the "
                "gathered outputs."
            )
        img, cam, labels = self._check(img, cam, labels)
        pairs = regions.positive_pairs(labels)  # (P, 2)
        pair_masks, pair_views = self._views(img, cam, pairs, self.config.eps, self._pairs_seen)
        self._pairs_seen += len(pairs)
        features = self._encoder.encode_image(torch.cat(pair_views), self.config.max_views)  # (2P, D)
        config, online = self.config, self.online_prompts
        if online is None or not (torch.is_grad_enabled() and cam.requires_grad):
            loss, by_name = self._terms(features, pair_masks, pairs, self._learned(pairs), config)
            return RefinerOutput(loss, by_name, pair_masks, pairs)
        own, related = pairs[:, 1], None if self._related is None else self._related.to(cam.device)
        step = online.step(self.prompts, self._encoder, config, self.text_features, features[len(pairs) :], own, related)
        config = config.replace(lambda_refine=step.factor * config.lambda_refine)
        loss, by_name = self._terms(features, pair_masks, pairs, (step.u_b, self.prompts.alive[own]), config)
        return RefinerOutput(loss, {**by_name, "prompt": step.loss}, pair_masks, pairs)

    def _terms(
        self,
        features: Tensor,
        pair_masks: Tensor,
        pairs: Tensor,
        learned: Optional[Tuple[Tensor, Tensor]],
        config: RefinerConfig,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Weighted sum and unweighted terms, each the (weighted) mean over the pairs; arguments as for `_pair_terms`."""
        values, weights = self._pair_terms(features, pair_masks, pairs, learned, config)
        return terms.weighted_sum(values, weights, terms.class_weights(pairs, self.classes, config))

    def _pair_terms(
        self,
        features: Tensor,
        pair_masks: Tensor,
        pairs: Tensor,
        learned: Optional[Tuple[Tensor, Tensor]],
        config: RefinerConfig,
    ) -> Tuple[Dict[str, Tensor], Dict[str, float]]:
        """`terms.pair_terms` of features (2P, D), first of the foregrounds, then of the backgrounds of the pairs (P, 2)."""
        own = pairs[:, 1]
        texts = self.background_features, self._background_owner[own]
        return terms.pair_terms(features, pair_masks, self.text_features[own], learned, texts, config)

    def _learned(self, pairs: Tensor) -> Optional[PromptsOfPairs]:
        """Features (P, N, D) of the pairs' prompts, and which are in use (P, N); None before prompts were learned."""
        own = pairs[:, 1]
        return (self.prompt_features()[own], self.prompts.alive[own]) if self.stage == "refine" else None

    @property
    def stage(self) -> str:
        """`"match"` until prompts were learned or loaded, then `"refine"`."""
        return "refine" if self.prompts.learned else "match"

    # ------------------------------------------------------------------------------------------------ stage (b)

    def fit_prompts(
        self,
        loader: Iterable[Any],
        cam_of: Callable[[Tensor], Tensor],
        *,
        epochs: Optional[int] = None,
        batch_size: Optional[int] = None,
        lr: Optional[float] = None,
        passes: int = 1,
        progress: bool = True,
    ) -> PromptFit:
        """Stage (b): learn the background prompts; the host is not touched.

        Every positive pair of the data is encoded once; the prompts are then learned on the cached features, so no image
        is encoded again however many epochs follow. Starts from the initial values of `seed` each time it is called. Under
        `torch.distributed` every process collects its own share of the data and all learn from all of it.

        Args:
            loader: yields `(img, labels)`, or longer tuples, lists or mappings that hold both; shapes as for `forward`.
            cam_of: img (B, 3, H, W) -> cam (B, C, h, w); called without gradients. It gets the loader's img as it is and moves
                it to the host's device itself. Put your host into eval mode first.
            epochs: over the cached features; `config.epochs` by default.
            batch_size: images per optimization step; `config.prompt_batch_size` by default.
            lr: learning rate; `config.prompt_lr` by default.
            passes: times the loader is gone through; more than one makes sense with random augmentation.
            progress: show progress bars.

        Returns:
            `PromptFit`: losses per epoch, and for every prompt how near it came to its backgrounds and to its class name, and
            whether it is alive. A prompt that failed is named in a warning and left out of L_refine.

        Raises:
            ValueError: if the data hold no positive label.
        """
        check_number("passes", passes, 1, whole=True)
        self._fit_config(epochs, batch_size, lr)  # wrong values are found before the work, not after it
        features, pairs = prompt_learning.collect(
            loader, cam_of, self.encode_backgrounds, len(self.classes), passes=passes, progress=progress
        )
        return self.fit_prompts_on(features, pairs, epochs=epochs, batch_size=batch_size, lr=lr, progress=progress)

    @torch.no_grad()
    def encode_backgrounds(self, img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """What stage (b) learns from, of one batch; for loops of your own that cannot hand a loader to `fit_prompts`.

        Args:
            img, cam, labels: as for `forward`; no gradient is needed.

        Returns:
            v_b (P, D), the feature of the background view of every positive pair, and pairs (P, 2), image and class index of
            each; both on the CPU. Add the number of images before this batch to `pairs[:, 0]` and concatenate.
        """
        img, cam, labels = self._check(img, cam, labels)
        pairs = regions.positive_pairs(labels)
        _, (_, background) = self._views(img, cam, pairs, self.config.prompt_eps)
        return self._encoder.encode_image(background, self.config.max_views).cpu(), pairs.cpu()

    def fit_prompts_on(
        self,
        features: Tensor,
        pairs: Tensor,
        *,
        epochs: Optional[int] = None,
        batch_size: Optional[int] = None,
        lr: Optional[float] = None,
        progress: bool = True,
    ) -> PromptFit:
        """Stage (b) on features that `encode_backgrounds` gave; see `fit_prompts` for everything else.

        Args:
            features: (P, D) v_b.
            pairs: (P, 2) image number and class of each.
            epochs, batch_size, lr, progress: as for `fit_prompts`.
        """
        config = self._fit_config(epochs, batch_size, lr)
        features, pairs = prompt_learning.gather_pairs(features, pairs)
        if len(pairs) == 0:
            raise ValueError("fit_prompts needs at least one positive label; the loader gave none. Check its labels.")
        related = None if self._related is None else self._related.to(self.device)
        fit = prompt_learning.learn(
            self.prompts, self._encoder, config, self.classes, self.text_features, features.to(self.device), pairs,
            related=related, progress=progress,
        )  # fmt: skip
        prompt_learning.broadcast_prompts(self.prompts)
        self._prompt_cache = None
        if fit.failed:
            warn(prompt_learning.failure_message(fit))
        return fit

    def _fit_config(self, epochs: Optional[int], batch_size: Optional[int], lr: Optional[float]) -> RefinerConfig:
        given = {"epochs": epochs, "prompt_batch_size": batch_size, "prompt_lr": lr}
        if torch.is_inference_mode_enabled():
            raise ValueError("fit_prompts trains the prompts and cannot run under torch.inference_mode(); call it outside.")
        return self.config.replace(**{name: value for name, value in given.items() if value is not None})

    # ------------------------------------------------------------------------------------------------ masks

    @torch.no_grad()
    def refine_masks(
        self,
        img: Tensor,
        cam: Tensor,
        labels: Tensor,
        *,
        threshold: masks.Threshold = 0.4,
        suppress: bool = False,
        align: masks.Aligns = "pamr",
        clip_steps: int = masks.CLIP_STEPS,
        clip_lr: float = masks.CLIP_LR,
        clip_grid: int = masks.CLIP_GRID,
        classes: Optional[Sequence[int]] = None,
    ) -> masks.RefinedMasks:
        """Refined masks and pseudo labels at image size, without training.

        Steps: `optimize_cam`, which moves each map to what CLIP takes for the class; with `suppress`, weigh down what CLIP's
        dense features assign to the background prompt or to another present class; `align` to image edges; background
        threshold and argmax. Every CLIP step encodes two views per positive pair, forward and backward.

        Args:
            img, cam, labels: as for `forward`; no gradient is needed.
            threshold: background score from 0 to 1; a class needs more than this. With two, (low, high), pixels between them
                are 255, see `masks.pseudo_labels`.
            suppress: weigh the masks with CLIP's dense features. It did harm with the demo world's small CLIP.
            align: `"pamr"`; `"crf"`, a dense CRF, which needs pydensecrf; None; or a callable (img (3, H, W) in [0, 1], masks
                (K, H, W)) -> (K, H, W). Also a list of these, one for each image, such as `mask_proposals.ProposalAlign`.
            clip_steps: gradient steps of `optimize_cam`; 0 leaves them out.
            clip_lr, clip_grid: `lr` and `grid` of `optimize_cam`.
            classes: index of the class of each channel of `cam`, each column of `labels` and each of the masks, if they hold
                only some of the classes, C' of them: memory does not grow with the others then.

        Returns:
            `RefinedMasks`: masks (B, C, H, W), zero for absent classes, and labels (B, H, W).
        """
        masks.check_threshold("threshold", threshold)
        check_number("clip_steps", clip_steps, 0, whole=True)
        img, cam, labels = self._check(img, cam, labels, classes)
        masks.check_align(align, len(img))
        if clip_steps:
            cam = self._optimize(img, cam, labels, clip_steps, clip_lr, clip_grid, classes)
        pairs = regions.positive_pairs(labels)
        weight = None
        if suppress and len(pairs):
            parts = self._clip_images(img).split(self.config.max_views or len(img))
            dense = torch.cat([self._encoder.encode_dense(part) for part in parts])
            u_b = self.prompt_features() if self.stage == "refine" else None
            alive, scale = self.prompts.alive, self._encoder.logit_scale
            weight = masks.suppression(dense, _of_classes(pairs, classes), self.text_features, u_b, scale, alive)
        plain = regions.change_stats(img.float(), self.image_stats, None).clamp(0, 1)
        result = masks.cam_to_masks(plain, cam, pairs, normalize=self.config.normalize, align=align, weight=weight)
        return masks.RefinedMasks(result, masks.pseudo_labels(result, threshold, classes))

    def optimize_cam(
        self,
        img: Tensor,
        cam: Tensor,
        labels: Tensor,
        *,
        steps: int = masks.CLIP_STEPS,
        lr: float = masks.CLIP_LR,
        grid: int = masks.CLIP_GRID,
    ) -> Tensor:
        """The CAM after gradient steps on the refiner's own loss, per image; for hosts that cannot be retrained.

        The logit of the normalized CAM gets d added, a map per pair on a coarse grid that starts at 0 and is learned with Adam,
        so that the CAM's own detail stays and no single pixel is free (see `masks.optimize`). Pairs do not influence one
        another; `config.max_views` bounds how many are worked on at once, and so the memory. The result can only be as good as
        the CLIP. A class of weight 0 in `class_weights` keeps its CAM; other weights hardly matter, since Adam's steps do
        not depend on the loss's scale.

        Args:
            img, cam, labels: as for `forward`; the CAM is a constant. A float64 CAM is normalized as such, the rest is float32.
            steps: gradient steps; two image encodes per pair each, forward and backward.
            lr: Adam's learning rate for d.
            grid: side of the coarse grid.

        Returns:
            (B, C, h, w) float32 in [0, 1]: the normalized CAM of present classes after the steps, 0 for absent ones.
        """
        return self._optimize(*self._check(img, cam, labels), steps, lr, grid)

    def _optimize(
        self,
        img: Tensor,
        cam: Tensor,
        labels: Tensor,
        steps: int,
        lr: float,
        grid: int,
        classes: Optional[Sequence[int]] = None,
    ) -> Tensor:
        """`optimize_cam` of a batch that was checked."""
        for name, value in (("steps", steps), ("grid", grid)):
            check_number(name, value, 1, whole=True)
        check_number("lr", lr, 0)
        at_once = max(1, (self.config.max_views or 2 * labels.numel()) // 2)
        with torch.inference_mode(False), torch.no_grad():
            images = self._view_images(img).clone()  # an ordinary tensor also under inference mode

            def loss_of(pair_masks: Tensor, pairs: Tensor, levels: Tensor) -> Tensor:
                pairs = _of_classes(pairs, classes)
                pair_views = views.pair_views(images, pair_masks, pairs, self._encoder, self.config, levels)
                features = self._encoder.encode_image(torch.cat(pair_views), self.config.max_views)
                return self._terms(features, pair_masks, pairs, self._learned(pairs), self.config)[0]

            return masks.optimize_cam(
                cam, regions.positive_pairs(labels), loss_of, self._encoder.image_size, self.config.normalize,
                steps=steps, lr=lr, grid=grid, at_once=at_once,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ check

    def check(
        self,
        loader: Iterable[Any],
        cam_of: Callable[[Tensor], Tensor],
        *,
        max_images: Optional[int] = None,
        progress: bool = True,
    ) -> CheckReport:
        """Will the loss help? Per class, from image-level labels and CAMs alone; nothing is trained and nothing changes.

        CLIP sees every image once and about 20 views of every positive pair, so a few hundred images are a sensible number.
        Under `torch.distributed` every process checks its own data.

        Args:
            loader: yields `(img, labels)`, as for `fit_prompts`.
            cam_of: img (B, 3, H, W) -> cam (B, C, h, w), as for `fit_prompts`.
            max_images: stop after so many images; shuffle the loader, or the first ones may all be alike.
            progress: show a progress bar.

        Returns:
            `CheckReport`: `print(report)` shows a table; `report.apply()` sets the options that it suggests.

        Raises:
            ValueError: if the loader gives no image.
        """
        if max_images is not None:
            check_number("max_images", max_images, 1, whole=True)
        size = (self._encoder.image_size,) * 2

        def prepare(img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
            img, cam, labels = self._check(img, cam, labels)
            pairs = regions.positive_pairs(labels)
            masks_of = regions.pair_masks(cam, pairs, size, self.config.normalize, self.config.eps)
            return self._clip_images(img), masks_of, pairs

        def terms_of(images: Tensor, shapes: Tensor, pairs: Tensor) -> Tuple[Dict[str, Tensor], Dict[str, float]]:
            pair_views = views.pair_views(images, shapes, pairs, self._encoder, self.config)
            features = self._encoder.encode_image(torch.cat(pair_views), self.config.max_views)
            return self._pair_terms(features, shapes, pairs, self._learned(pairs), self.config)

        def configure(**options: Any) -> RefinerConfig:
            self.config = self.config.replace(**options)
            return self.config

        return checking.check(
            loader, cam_of, self.classes, prepare, terms=terms_of, configure=configure,
            encode=lambda pair_views: self._encoder.encode_image(pair_views, self.config.max_views),
            text_features=self.text_features, prompt_features=self.prompt_features() if self.stage == "refine" else None,
            config=self.config, clip=self._encoder.id, max_images=max_images, progress=progress,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ prompts

    @torch.no_grad()
    def prompt_features(self) -> Tensor:
        """(C, N, D) u_b, the text features of the background prompts; encoded once and cached until the prompts change.

        Features of prompts that are not in use, see `prompts.alive`, are there too.
        """
        context = self.prompts.context
        cache = self._prompt_cache
        if cache is None or cache[0] is not context or cache[1:3] != (context._version, context.device):
            with torch.inference_mode(False):  # the cache may be used with gradients later
                features = prompts.encode_contexts(self._encoder, context, self.config.prompt_template)
            cache = self._prompt_cache = (context, context._version, context.device, features)
        return cache[3]

    @torch.no_grad()
    def nearest_words(self, vocabulary: Optional[Sequence[str]] = None, top: int = 5) -> List[NearestWords]:
        """What each background prompt says: the words whose text features are nearest to its feature u_b.

        Args:
            vocabulary: words or phrases; by default a list of our own (places, ground, plants, furniture, ...).
            top: words per class.

        Returns:
            One `NearestWords` per prompt, class by class: name, cos(u_f, u_b), (word, cosine) pairs, nearest first, and whether
            the prompt is in use.

        Raises:
            ValueError: if no prompts were learned or loaded yet, or the vocabulary is empty.
        """
        if self.stage != "refine":
            raise ValueError("There are no prompts to read yet. Call fit_prompts(...) or load_prompts(path) first.")
        words = list(prompts.default_vocabulary() if vocabulary is None else vocabulary)
        if not words:
            raise ValueError("`vocabulary` must hold at least one word; got none.")
        texts = [self.config.prompt_template.replace("{}", word).replace(" .", ".") for word in words]
        features, u_b = self._encoder.encode_text(texts), self.prompt_features()  # (V, D), (C, N, D)
        return prompts.nearest_words(self.classes, self.text_features, u_b, self.prompts.alive, words, features, top)

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: PathLike) -> None:
        """Write the learned prompts, class names, CLIP id and the whole configuration as safetensors; no CLIP weights."""
        if self.stage != "refine":
            raise ValueError("There are no prompts to save yet. Call fit_prompts(...) first.")
        encoder, context = self._encoder, self.prompts.context
        config = self.config.replace(prompts_per_class=context.shape[1], prompt_length=context.shape[2])
        alive = self.prompts.alive.tolist()
        content = PromptFile(context, alive, self.classes, self.prompt_names, encoder.name, encoder.fingerprint, config)
        write_file(path, content)

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        clip: Union[None, str, "os.PathLike[str]", nn.Module, ClipEncoder] = None,
        **overrides: Any,
    ) -> "PromptRefiner":
        """The refiner that `save` wrote: classes, prompts and the whole configuration.

        Args:
            path: a file of `save`.
            clip: the CLIP to use; by default the one that the file names, if it is one of OpenAI's published models. Files and
                models of other makers are not opened because a file says so: name them here.
            **overrides: options of `RefinerConfig` to change.
        """
        content = read_file(path)
        classes = dict(zip(content.classes, content.prompt_names))
        if clip is None and content.clip not in published_clips():
            raise PromptFileError(
                f"The prompts in {os.fspath(path)} were learned with CLIP {content.clip!r:.200}, which is none of OpenAI's "
                "published models, so it is not opened because the file says so. Pass it: PromptRefiner.load(path, clip=...), "
                "--clip FILE."
            )
        try:
            refiner = cls(classes, content.clip if clip is None else clip, content.config, **overrides)
        except ClipError as error:
            if clip is not None:
                raise
            raise PromptFileError(
                f"The prompts in {os.fspath(path)} were learned with CLIP {content.clip!r}, which that name does not load "
                f"({error}) Pass it: PromptRefiner.load(path, clip=...)."
            ) from error
        return refiner._take_over(content, path)

    def load_prompts(self, path: PathLike) -> "PromptRefiner":
        """Take over the prompts of a file of `save`; nothing changes if they do not fit. Options stay those of this refiner.

        Raises:
            FileNotFoundError: if there is no such file.
            PromptFileError: if the file is damaged or foreign, or was made for other classes, templates or another CLIP.
        """
        return self._take_over(read_file(path), path)

    def _take_over(self, content: PromptFile, path: PathLike) -> "PromptRefiner":
        """The prompts of a file that was read, if they fit; `path` is for the message."""
        check_fits(path, content, self.classes, self.prompt_names, self._encoder, self.config)
        self.prompts.take(content.context, torch.tensor(content.alive))  # the file's number and length of prompts count
        self._prompt_cache = None
        return self

    # ------------------------------------------------------------------------------------------------ inside

    @property
    def device(self) -> torch.device:
        """Where the text features and prompts are; the module follows the `cam` it is given."""
        return self.text_features.device

    @property
    def encoder(self) -> ClipEncoder:
        """The frozen CLIP."""
        return self._encoder

    def extra_repr(self) -> str:
        clusters = "" if self.config.clusters is None else f", {len(self.config.clusters)} clusters"
        return f"{len(self.classes)} classes, clip={self._encoder.name!r}, stage={self.stage!r}{clusters}"

    def _check(self, img: Any, cam: Any, labels: Any, classes: Optional[Sequence[int]] = None) -> Tuple[Tensor, Tensor, Tensor]:
        config, count = self.config, len(self.classes)
        if classes is not None:
            if not len(classes) or list(classes) != sorted({*classes} & {*range(count)}):
                raise ValueError(
                    f"`classes` must hold ascending class indices from 0 to {count - 1}; got {list(classes)!r:.200}."
                )
            count = len(classes)
        img, cam, labels = check_batch(
            img, cam, labels, count, config.background_channel, self.image_stats, config.normalize is None
        )
        if not self.device == self._encoder.device == cam.device:
            self.to(cam.device)
        return img, cam, labels

    def _clip_images(self, img: Tensor) -> Tensor:
        return views.clip_images(img, self.image_stats, self._encoder, self.config)

    def _view_images(self, img: Tensor) -> Tensor:
        return views.view_images(img, self.image_stats, self._encoder, self.config)

    def _views(
        self, img: Tensor, cam: Tensor, pairs: Tensor, eps: float, start: int = 0
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
        """Masks (P, S, S), and foreground and background views (P, 3, S, S) of the pairs."""
        size = self._encoder.image_size
        pair_masks = regions.pair_masks(cam, pairs, (size, size), self.config.normalize, eps)
        levels = regions.cut_levels(start, len(pairs))
        return pair_masks, views.pair_views(self._view_images(img), pair_masks, pairs, self._encoder, self.config, levels)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_prompt_cache": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "PromptRefiner":
        # Follow moves between devices, not changes of precision: `host.half()` must not round prompts or text features.
        device = fn(self.text_features).device
        super()._apply(lambda tensor: tensor.to(device), *args, **kwargs)
        self._encoder.to(device)
        return self


def _of_classes(pairs: Tensor, classes: Optional[Sequence[int]]) -> Tensor:
    """Pairs (P, 2) of image and channel as pairs of image and class."""
    if classes is None:
        return pairs
    return torch.stack([pairs[:, 0], torch.as_tensor(classes, device=pairs.device)[pairs[:, 1]]], dim=1)
