"""`PromptRefiner`: the one module that people build. It holds the prompts, the text features and a frozen CLIP.

Flow of a step: img, cam, labels -> `regions` -> `clip_encoder` -> `losses` -> one scalar. The module is a thin shell: the
mathematics lives in the functions of those files.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses, masks, prompts, regions
from ._checks import check_batch, check_classes, check_number, check_stats
from .clip_encoder import ClipEncoder, full_precision, load_clip
from .clusters import CategoryClusters
from .errors import ClipError, DetachedCamError, PromptFileError
from .prompts import BackgroundPrompts, PromptFit, PromptReading

__all__ = ["COCO", "VOC", "PromptRefiner", "Recipe", "RefinerOutput"]


class Recipe(NamedTuple):
    """Numbers of a published run (SemPLeS, reference recipe).

    Attributes:
        lambda_b: weight of the background half of L_match.
        lambda_t: weight of T in L_prompt, tuned for `repel="log"`.
        lambda_refine: lambda, weight of L_refine.
        eps: of the min-max normalisation in stages (a) and (c).
        prompt_eps: of the min-max normalisation in stage (b).
        prompt_length: L, context vectors per prompt.
        prompt_init: initial values of the context, "uniform" is U[0, 1).
        prompt_rate: learning rate of stage (b), AdamW, cosine schedule.
        prompt_batch_size: images per step of stage (b).
        epochs: of every stage.
        weight_decay: of AdamW, every stage.
        host_rates: learning rates of the host in stages (a) and (c); for your own optimiser, the refiner has none.
        host_batch_sizes: images per step in stages (a) and (c).
    """

    lambda_b: float
    lambda_t: float
    lambda_refine: float
    eps: float = 0.1
    prompt_eps: float = 1e-4
    prompt_length: int = 30
    prompt_init: str = "uniform"
    prompt_rate: float = 2.5e-2
    prompt_batch_size: int = 128
    epochs: int = 60
    weight_decay: float = 0.03
    host_rates: Tuple[float, float] = (6.4e-5, 6.4e-5)
    host_batch_sizes: Tuple[int, int] = (64, 64)


VOC = Recipe(lambda_b=2.4, lambda_t=0.02, lambda_refine=0.05)
COCO = Recipe(
    lambda_b=0.75, lambda_t=0.01, lambda_refine=0.2, prompt_rate=2.5e-3,
    host_rates=(3.2e-7, 2.4e-7), host_batch_sizes=(32, 24),
)  # fmt: skip
MASK_EPS = 1e-6  # of the normalisation in `refine`: masks must not depend on the scale of the CAM
_RECIPES = {"voc": VOC, "coco": COCO}


class RefinerOutput(NamedTuple):
    """What `PromptRefiner.compute` returns.

    Attributes:
        loss: scalar, float32, attached to `cam`.
        terms: the unweighted terms by name: match_foreground, match_background, and, where they apply, refine,
            background_texts, area.
        cam: (P, S, S) normalised CAM of every positive pair at CLIP's input size, in [0, 1].
        pairs: (P, 2) image and class index of each of these maps.
    """

    loss: Tensor
    terms: Dict[str, Tensor]
    cam: Tensor
    pairs: Tensor


class PromptRefiner(nn.Module):
    """CLIP-aligned losses and masks for any model's class activation maps (SemPLeS, arXiv 2401.11791).

    Three stages: (a) before prompts exist the loss is L_match; (b) `fit_prompts` learns the background prompts with the host
    frozen; (c) from then on the loss is L_match + lambda L_refine.

        L_match  = < -log c(v_f, u_f) > + lambda_b < -log(1 - c(v_b, u_f)) >
        L_refine = < -log(1 - c(v_f, u_b)) >

    where v_f, v_b: CLIP features of the region that the CAM keeps and of the rest; u_f: text feature of the class;
    u_b: feature of its learned background prompt; c: cosine clamped to [1e-4, 0.9999]; < >: mean over positive pairs (with
    several processes: each over its own).

    The CLIP model is frozen and is no part of `parameters()` or `state_dict()`. The module follows the device of `cam`.

    Args:
        classes: C class names, or a mapping class name -> name to prompt CLIP with (`{"person": "player", ...}`).
        clip: `"ViT-B/32"` and the like, a weights file, a loaded OpenAI or open_clip model, or
            `"open_clip:<architecture>/<tag>"`; see `semples_plugin.clip_encoder.load_clip`.
        recipe: `"voc"`, `"coco"` or a `Recipe`: where all numbers below come from unless you give them.
        lambda_b: weight of the background half of L_match.
        lambda_refine: lambda, weight of L_refine.
        lambda_t: weight of T in L_prompt.
        repel: form of T, `"log"` or `"log1m"`.
        eps: of the min-max normalisation.
        normalise: `"minmax"`, or None for a CAM in [0, 1].
        background_channel: whether channel 0 of `cam` is background (then `cam` is (B, C + 1, h, w)).
        image_stats: statistics of `img`: `"imagenet"`, `(mean, std)`, or None for images in [0, 1].
        clip_stats: convert images to CLIP's own statistics; False feeds them as they are, as the reference does.
        text_template: text of a class, with one `{}`.
        prompt_template: layout of a background prompt, with one `{}` for its context vectors.
        prompt_length: L, at most 71 with the default layout.
        prompt_init: `"uniform"` or `"normal"`.
        background_texts: hand-written background prompts: a list for all classes, or a mapping class name -> list.
        lambda_background_texts: weight of their term (CLIMS, CVPR 2022).
        background_threshold: cosine above which a hand-written prompt counts.
        lambda_area: weight of the area term (CLIMS).
        clusters: category clusters (PCC), or a mapping cluster name -> classes: in stage (b) a background prompt is pushed away
            from every class of its class's cluster, not from its class alone; see `losses.prompt_repel_cluster`.
        max_views: views that CLIP encodes at once (2 per positive pair); more are encoded in checkpointed chunks, which
            bounds memory and costs a second forward pass through CLIP. ViT-B/32 in float32 takes about 40 MiB per view.
            None: no limit.
        clip_dtype: of CLIP's weights. Similarities are float32 in any case.
        seed: of the prompts' initial values and of the order of images in `fit_prompts`.

    Raises:
        TypeError, ValueError: for wrong arguments; the message says what to do.
        ClipError: if the CLIP model cannot be had.

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

    def __init__(
        self,
        classes: Union[Sequence[str], Mapping[str, str]],
        *,
        clip: Union[str, "os.PathLike[str]", nn.Module, ClipEncoder] = "ViT-B/32",
        recipe: Union[str, Recipe] = "voc",
        lambda_b: Optional[float] = None,
        lambda_refine: Optional[float] = None,
        lambda_t: Optional[float] = None,
        repel: str = "log",
        eps: Optional[float] = None,
        normalise: Optional[str] = "minmax",
        background_channel: bool = False,
        image_stats: Any = "imagenet",
        clip_stats: bool = True,
        text_template: str = "a photo of a {}.",
        prompt_template: str = "a photo of {} .",
        prompt_length: Optional[int] = None,
        prompt_init: Optional[str] = None,
        background_texts: Union[None, Sequence[str], Mapping[str, Sequence[str]]] = None,
        lambda_background_texts: float = 0.0,
        background_threshold: float = 0.0,
        lambda_area: float = 0.0,
        clusters: Union[None, CategoryClusters, Mapping[str, Sequence[str]]] = None,
        max_views: Optional[int] = 256,
        clip_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__()
        self.classes, self.prompt_names = check_classes(classes)
        self.recipe = _recipe(recipe)
        self.image_stats = check_stats(image_stats)
        self.clusters = _clusters(clusters, self.classes)
        if background_texts and not lambda_background_texts:
            raise ValueError("`background_texts` needs `lambda_background_texts` > 0, or they would do nothing; got 0.")
        if lambda_background_texts and not background_texts:
            raise ValueError("`lambda_background_texts` needs `background_texts`, such as ['a photo of railway.']; got none.")
        if text_template.count("{}") != 1:
            raise ValueError(f"`text_template` must hold `{{}}` once; got {text_template!r}.")
        if repel not in ("log", "log1m"):
            raise ValueError(f"`repel` must be 'log' or 'log1m'; got {repel!r}.")
        if normalise not in ("minmax", None):
            raise ValueError(f"`normalise` must be 'minmax' or None; got {normalise!r}.")
        if max_views is not None:
            check_number("max_views", max_views, 1, whole=True, advice=", or None for no limit")
        self.lambda_b = self.recipe.lambda_b if lambda_b is None else lambda_b
        self.lambda_refine = self.recipe.lambda_refine if lambda_refine is None else lambda_refine
        self.lambda_t = self.recipe.lambda_t if lambda_t is None else lambda_t
        self.eps = self.recipe.eps if eps is None else eps
        weights = {"lambda_b": self.lambda_b, "lambda_refine": self.lambda_refine, "lambda_t": self.lambda_t}
        weights.update(lambda_background_texts=lambda_background_texts, lambda_area=lambda_area)
        for name, value in weights.items():
            check_number(name, value, 0)
        check_number("background_threshold", background_threshold, -1)
        check_number("eps", self.eps, 1e-12)  # a flat map divides by it
        self.repel, self.normalise, self.max_views, self.seed = repel, normalise, max_views, seed
        self.background_channel, self.clip_stats = background_channel, clip_stats
        self.text_template, self.prompt_template = text_template, prompt_template
        self.lambda_background_texts, self.background_threshold = lambda_background_texts, background_threshold
        self.lambda_area = lambda_area

        self._encoder = load_clip(clip, dtype=clip_dtype)  # a plain object: not registered, not saved, not trained
        length = self.recipe.prompt_length if prompt_length is None else prompt_length
        longest = self._encoder.max_prompt_length(prompt_template)
        check_number("prompt_length", length, float("-inf"), whole=True)
        if not 1 <= length <= longest:
            raise ValueError(
                f"`prompt_length` must be from 1 to {longest}, what CLIP's {self._encoder.context_length} tokens leave in the "
                f"layout {prompt_template!r}; got {length}."
            )
        init = self.recipe.prompt_init if prompt_init is None else prompt_init
        self.prompts = BackgroundPrompts(len(self.classes), length, self._encoder.context_dim, init, seed)
        with torch.no_grad():
            texts = [text_template.replace("{}", name) for name in self.prompt_names]
            self.register_buffer("text_features", self._encoder.encode_text(texts), persistent=False)  # (C, D)
            hand_written, owner = _hand_written(background_texts, self.classes)
            self.register_buffer("background_features", self._encoder.encode_text(hand_written), persistent=False)  # (K, D)
            self.register_buffer("_background_owner", owner, persistent=False)  # (C, K)
        self._background_owner: Tensor
        self._prompt_cache: Optional[Tuple[Tensor, int, torch.device, Tensor]] = None
        self.to(self._encoder.device)

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, img: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """The loss of the current stage, to be added to the host's own.

        Args:
            img: (B, 3, H, W) the batch as the host sees it (statistics as in `image_stats`).
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
        """Loss, named terms and normalised CAM of one batch; arguments as for `forward`.

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
        kept, (foreground, background) = self._views(img, cam, pairs, self.eps)
        loss, terms = self._terms(torch.cat([foreground, background]), kept, pairs)
        return RefinerOutput(loss, terms, kept, pairs)

    def _terms(self, views: Tensor, kept: Tensor, pairs: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Weighted sum and unweighted terms for the views (2P, 3, S, S), first foregrounds, then backgrounds, of the pairs."""
        features = self._encoder.encode_image(views, self.max_views)  # (2P, D)
        v_f, v_b = features[: len(pairs)], features[len(pairs) :]  # (P, D) each
        u_f = self.text_features[pairs[:, 1]]  # (P, D)
        terms = {
            "match_foreground": losses.match_foreground(v_f, u_f),
            "match_background": losses.match_background(v_b, u_f),
        }
        weights = {"match_foreground": 1.0, "match_background": self.lambda_b}
        if self.stage == "refine":
            terms["refine"] = losses.refine(v_f, self.prompt_features()[pairs[:, 1]])
            weights["refine"] = self.lambda_refine
        if self.lambda_background_texts:
            present = self._background_owner[pairs[:, 1]]  # (P, K)
            terms["background_texts"] = losses.background_texts(
                v_f, self.background_features, present, self.background_threshold
            )
            weights["background_texts"] = self.lambda_background_texts
        if self.lambda_area:
            terms["area"] = losses.area(kept)
            weights["area"] = self.lambda_area
        loss = torch.stack([weights[name] * term.float() for name, term in terms.items()]).sum()
        return loss, terms

    @property
    def stage(self) -> str:
        """`"match"` until prompts were learned or loaded, then `"refine"`."""
        return "refine" if self.prompts.learned else "match"

    def fit_prompts(
        self,
        loader: Iterable[Any],
        cam_of: Callable[[Tensor], Tensor],
        *,
        epochs: Optional[int] = None,
        passes: int = 1,
        batch_size: Optional[int] = None,
        rate: Optional[float] = None,
        progress: bool = True,
    ) -> PromptFit:
        """Stage (b): learn the background prompts; the host is not touched.

        Every positive pair of the data is encoded once; the prompts are then learned on the cached features, so no image
        is encoded again however many epochs follow. Starts from the initial values of `seed` each time it is called. Under
        `torch.distributed` every process collects its own share of the data and all learn from all of it.

        Args:
            loader: yields `(img, labels)` or longer tuples that begin so; shapes as for `forward`.
            cam_of: img (B, 3, H, W) -> cam (B, C, h, w); called without gradients. It gets the loader's img as it is and moves
                it to the host's device itself. Put your host into eval mode first.
            epochs: over the cached features; the recipe's 60 by default.
            passes: times the loader is gone through; more than one makes sense with random augmentation.
            batch_size: images per optimisation step; the recipe's 128 by default.
            rate: learning rate; the recipe's by default.
            progress: show progress bars.

        Returns:
            `PromptFit`: losses per epoch and how near the prompts came to the backgrounds and to the class names.

        Raises:
            ValueError: if the data hold no positive label.
        """
        check_number("passes", passes, 1, whole=True)
        self._fit_options(epochs, batch_size, rate)  # before the work, not after it
        features, pairs = self._collect(loader, cam_of, passes, progress)
        return self.fit_prompts_on(features, pairs, epochs=epochs, batch_size=batch_size, rate=rate, progress=progress)

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
        _, (_, background) = self._views(img, cam, pairs, self.recipe.prompt_eps)
        return self._encoder.encode_image(background, self.max_views).cpu(), pairs.cpu()

    def fit_prompts_on(
        self,
        features: Tensor,
        pairs: Tensor,
        *,
        epochs: Optional[int] = None,
        batch_size: Optional[int] = None,
        rate: Optional[float] = None,
        progress: bool = True,
    ) -> PromptFit:
        """Stage (b) on features that `encode_backgrounds` gave; see `fit_prompts` for everything else.

        Args:
            features: (P, D) v_b.
            pairs: (P, 2) image number and class of each.
            epochs, batch_size, rate, progress: as for `fit_prompts`.
        """
        epochs, batch_size, rate = self._fit_options(epochs, batch_size, rate)
        features, pairs = _gather(features, pairs)
        if len(pairs) == 0:
            raise ValueError("fit_prompts needs at least one positive label; the loader gave none. Check its labels.")
        before = {name: value.clone() for name, value in self.prompts.state_dict().items()}
        self.prompts.reset()
        try:
            fit = prompts.learn(
                self.prompts,
                self._encoder,
                self.prompt_template,
                self.text_features,
                features.to(self.device),
                pairs,
                lambda_t=self.lambda_t,
                form=self.repel,
                epochs=epochs,
                batch_size=batch_size,
                rate=rate,
                weight_decay=self.recipe.weight_decay,
                related=None if self.clusters is None else self.clusters.related(self.device),
                seed=self.seed,
                progress=progress,
            )
        except BaseException:  # also an interrupt: half-learned prompts must not pass for learned ones
            self.prompts.load_state_dict(before)
            raise
        _broadcast(self.prompts.context)
        self._prompt_cache = None
        return fit

    def _fit_options(self, epochs: Optional[int], batch_size: Optional[int], rate: Optional[float]) -> Tuple[int, int, float]:
        epochs = self.recipe.epochs if epochs is None else epochs
        batch_size = self.recipe.prompt_batch_size if batch_size is None else batch_size
        rate = self.recipe.prompt_rate if rate is None else rate
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            check_number(name, value, 1, whole=True)
        check_number("rate", rate, 0)
        if torch.is_inference_mode_enabled():
            raise ValueError("fit_prompts trains the prompts and cannot run under torch.inference_mode(); call it outside.")
        return epochs, batch_size, rate

    @torch.no_grad()
    def _collect(
        self, loader: Iterable[Any], cam_of: Callable[[Tensor], Tensor], passes: int, progress: bool
    ) -> Tuple[Tensor, Tensor]:
        """v_b of every positive pair (P, D), and image number and class of each (P, 2)."""
        features: List[Tensor] = [torch.zeros(0, self._encoder.embed_dim)]
        numbers: List[Tensor] = [torch.zeros(0, 2, dtype=torch.long)]
        count = 0
        for _ in range(passes):
            batches = 0
            for batch in prompts.progress_bar(loader, "collecting background features", progress):
                if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                    raise TypeError(
                        f"`loader` must yield (img, labels); got {type(batch).__name__}. Wrap it, e.g. "
                        "((b['img'], b['labels']) for b in loader)."
                    )
                batches += 1
                img, labels = batch[:2]
                cam = cam_of(img)
                if isinstance(cam, Tensor) and isinstance(img, Tensor) and isinstance(labels, Tensor):
                    img, labels = img.to(cam.device), labels.to(cam.device)
                found, pairs = self.encode_backgrounds(img, cam, labels)
                features.append(found)
                numbers.append(pairs + torch.tensor([count, 0]))
                count += len(img)
            if batches == 0 and count:
                raise ValueError("With passes > 1 `loader` must start again each time; a generator is used up after one pass.")
        return torch.cat(features), torch.cat(numbers)

    # ------------------------------------------------------------------------------------------------ masks

    @torch.no_grad()
    def refine(
        self,
        img: Tensor,
        cam: Tensor,
        labels: Tensor,
        *,
        threshold: float = 0.4,
        suppress: bool = False,
        align: Union[None, str, masks.Align] = "pamr",
        background_power: Optional[float] = None,
    ) -> masks.RefinedMasks:
        """Refined masks and pseudo labels at image size, without training.

        Steps: normalise the CAM; with `suppress`, weigh down what CLIP's dense features assign to the background prompt or
        to another present class; `align` to image edges; background threshold and argmax. The defaults are what measured
        best in the demo world, whose small CLIP is poor at dense features; try `suppress=True` with a larger one.

        Args:
            img, cam, labels: as for `forward`; no gradient is needed.
            threshold: background score; a class needs more than this.
            suppress: weigh the masks with CLIP's dense features.
            align: `"pamr"`, None, or a callable (img (3, H, W) in [0, 1], masks (K, H, W)) -> (K, H, W) such as a CRF.
            background_power: if given, the background score is (1 - max of masks) ** power instead of `threshold`.

        Returns:
            `RefinedMasks`: masks (B, C, H, W), zero for absent classes, and labels (B, H, W).
        """
        if align not in (None, "pamr") and not callable(align):
            raise ValueError(f"`align` must be 'pamr', None or a callable; got {align!r}.")
        img, cam, labels = self._check(img, cam, labels)
        pairs = regions.positive_pairs(labels)
        height, width = img.shape[2:]
        result = torch.zeros(len(img), len(self.classes), height, width, device=img.device)
        if len(pairs):
            maps = regions.pair_masks(cam, pairs, (height, width), self.normalise, MASK_EPS).float()  # (P, H, W)
            if suppress:
                views = self._clip_images(img)
                dense = torch.cat([self._encoder.encode_dense(v) for v in views.split(self.max_views or len(views))])
                u_b = self.prompt_features() if self.stage == "refine" else None
                weight = masks.suppression(dense, pairs, self.text_features, u_b, self._encoder.logit_scale)
                maps = maps * F.interpolate(weight[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
            plain = regions.change_stats(img.float(), self.image_stats, None).clamp(0, 1)
            result[pairs[:, 0], pairs[:, 1]] = masks.align_maps(plain, maps, pairs, align)
        return masks.RefinedMasks(result, masks.pseudo_labels(result, threshold, background_power))

    def optimise_cam(
        self, img: Tensor, cam: Tensor, labels: Tensor, *, steps: int = 20, rate: float = 0.1, grid: int = 16
    ) -> Tensor:
        """A better CAM for images whose host cannot be retrained: gradient steps on the refiner's own loss, per image.

        The CAM is weighed by 2 sigmoid(d), d a map per pair on a coarse grid that starts at 0 and is learned with Adam, so
        that the CAM's own detail stays and no single pixel is free. Pairs do not influence one another.

        Args:
            img, cam, labels: as for `forward`; the CAM is a constant.
            steps: gradient steps; two image encodes per pair each.
            rate: Adam's learning rate for d.
            grid: side of the coarse grid.

        Returns:
            (B, C, h, w) in [0, 1]: the normalised, weighed CAM of present classes, 0 for absent ones.
        """
        for name, value in (("steps", steps), ("grid", grid)):
            check_number(name, value, 1, whole=True)
        check_number("rate", rate, 0)
        img, cam, labels = self._check(img, cam, labels)
        pairs = regions.positive_pairs(labels)
        height, width = cam.shape[2:]
        result = torch.zeros(len(img), len(self.classes), height, width, device=cam.device)
        if not len(pairs):
            return result
        base = regions.pair_masks(cam.detach(), pairs, (height, width), self.normalise, MASK_EPS)  # (P, h, w)
        size = (self._encoder.image_size,) * 2
        clip_images = self._clip_images(img)

        def weighed(d: Tensor) -> Tensor:
            weight = F.interpolate(d[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
            return (base * 2 * torch.sigmoid(weight)).clamp(max=1)

        with torch.enable_grad():
            d = torch.zeros(len(pairs), grid, grid, device=cam.device, requires_grad=True)
            optimizer = torch.optim.Adam([d], lr=rate)
            for _ in range(steps):
                kept = F.interpolate(weighed(d)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
                loss, _ = self._terms(torch.cat(regions.split(clip_images, kept, pairs)), kept, pairs)
                optimizer.zero_grad()
                (loss * len(pairs)).backward()  # the terms are means over pairs
                optimizer.step()
            result[pairs[:, 0], pairs[:, 1]] = weighed(d).detach()
        return result

    # ------------------------------------------------------------------------------------------------ prompts

    @torch.no_grad()
    def prompt_features(self) -> Tensor:
        """(C, D) u_b, the text features of the background prompts; encoded once and kept until the prompts change."""
        context = self.prompts.context
        cache = self._prompt_cache
        if cache is None or cache[0] is not context or cache[1:3] != (context._version, context.device):
            chunks = [self._encoder.encode_prompt(c, self.prompt_template) for c in context.split(64)]
            cache = self._prompt_cache = (context, context._version, context.device, torch.cat(chunks))
        return cache[3]

    @torch.no_grad()
    def read_prompts(self, vocabulary: Optional[Sequence[str]] = None, top: int = 5) -> List[PromptReading]:
        """What each background prompt says: the nearest vocabulary entries to its feature u_b.

        Args:
            vocabulary: words or phrases; by default a list of our own (places, ground, plants, furniture, ...).
            top: entries per class.

        Returns:
            One `PromptReading` per class: name, cos(u_f, u_b), and (word, cosine) pairs, nearest first.

        Raises:
            ValueError: if no prompts were learned or loaded yet, or the vocabulary is empty.
        """
        if self.stage != "refine":
            raise ValueError("There are no prompts to read yet. Call fit_prompts(...) or load_prompts(path) first.")
        words = list(prompts.default_vocabulary() if vocabulary is None else vocabulary)
        if not words:
            raise ValueError("`vocabulary` must hold at least one word; got none.")
        texts = [self.prompt_template.replace("{}", word).replace(" .", ".") for word in words]
        features = F.normalize(self._encoder.encode_text(texts), dim=-1)
        u_b = F.normalize(self.prompt_features(), dim=-1)
        own = F.cosine_similarity(self.text_features, u_b, dim=-1).tolist()
        with full_precision(self.device):
            nearest = (u_b @ features.T).topk(min(top, len(words)), dim=1)
        return [
            PromptReading(
                name, own[k], [(words[i], s) for i, s in zip(nearest.indices[k].tolist(), nearest.values[k].tolist())]
            )
            for k, name in enumerate(self.classes)
        ]

    def save_prompts(self, path: Union[str, "os.PathLike[str]"]) -> None:
        """Write the learned prompts as safetensors, with class names, CLIP id, templates and length; no CLIP weights."""
        if self.stage != "refine":
            raise ValueError("There are no prompts to save yet. Call fit_prompts(...) first.")
        facts = {
            "classes": self.classes,
            "prompt_names": self.prompt_names,
            "clip": self._encoder.name,
            "clip_fingerprint": self._encoder.fingerprint,
            "template": self.text_template,
            "prompt_template": self.prompt_template,
            "clip_stats": self.clip_stats,
            "prompt_length": self.prompts.context.shape[1],
        }
        if self.clusters is not None:
            facts["clusters"] = self.clusters.as_dict()
        prompts.write_file(path, self.prompts.context, facts)

    def load_prompts(self, path: Union[str, "os.PathLike[str]"]) -> "PromptRefiner":
        """Take over prompts that were saved by `save_prompts`; nothing changes if they do not fit.

        Raises:
            FileNotFoundError: if there is no such file.
            PromptFileError: if the file is damaged or foreign, or was made for other classes, templates or another CLIP.
        """
        context, facts = prompts.read_file(path)
        prompts.same_or_error(path, "classes", self.classes, facts["classes"])
        prompts.same_or_error(path, "prompt names", self.prompt_names, facts["prompt_names"])
        clip = (f"{facts['clip']} [{facts['clip_fingerprint']}]",)
        if facts["clip_fingerprint"] != self._encoder.fingerprint:
            prompts.same_or_error(path, "CLIP weights", (self._encoder.id,), clip)
        prompts.same_or_error(
            path, "templates", (self.text_template, self.prompt_template), (facts["template"], facts["prompt_template"])
        )
        views = [f"clip_stats={value}" for value in (self.clip_stats, facts.get("clip_stats", self.clip_stats))]
        prompts.same_or_error(path, "image statistics for CLIP", views[:1], views[1:])
        if context.shape[2] != self.prompts.context.shape[2]:
            prompts.same_or_error(path, "CLIP token size", (str(self._encoder.context_dim),), (str(context.shape[2]),))
        with torch.no_grad():
            if context.shape == self.prompts.context.shape:
                self.prompts.context.copy_(context)
            else:  # another length; the prompts are one block, so the file's length counts
                self.prompts.context = nn.Parameter(context.to(self.device), requires_grad=False)
            self.prompts.learned.fill_(True)
        self._prompt_cache = None
        return self

    @classmethod
    def load(
        cls,
        path: Union[str, "os.PathLike[str]"],
        *,
        clip: Union[None, str, "os.PathLike[str]", nn.Module, ClipEncoder] = None,
        **options: Any,
    ) -> "PromptRefiner":
        """A refiner for the classes, templates and prompts of a prompt file.

        Args:
            path: a file of `save_prompts`.
            clip: the CLIP to use; by default the one that the file names.
            **options: further arguments of `PromptRefiner`. The file holds what belongs to the prompts; what belongs to your
                pipeline has to be said again: recipe and weights, image_stats, background_channel, normalise.
        """
        context, facts = prompts.read_file(path)
        classes = dict(zip(facts["classes"], facts["prompt_names"]))
        options = {"text_template": facts["template"], "prompt_template": facts["prompt_template"], **options}
        options.setdefault("prompt_length", context.shape[1])
        options.setdefault("clip_stats", facts.get("clip_stats", True))
        options.setdefault("clusters", facts.get("clusters"))
        try:
            refiner = cls(classes, clip=facts["clip"] if clip is None else clip, **options)
        except ClipError as error:
            if clip is not None:
                raise
            raise PromptFileError(
                f"The prompts in {os.fspath(path)} were learned with CLIP {facts['clip']!r}, which that name does not load "
                f"({error}) Pass it: PromptRefiner.load(path, clip=...)."
            ) from error
        return refiner.load_prompts(path)

    # ------------------------------------------------------------------------------------------------ inside

    @property
    def device(self) -> torch.device:
        """Where the text features and prompts live; the module follows the `cam` it is given."""
        return self.text_features.device

    @property
    def encoder(self) -> ClipEncoder:
        """The frozen CLIP."""
        return self._encoder

    def extra_repr(self) -> str:
        told = "" if self.clusters is None else f", {len(self.clusters)} clusters"
        return f"{len(self.classes)} classes, clip={self._encoder.name!r}, stage={self.stage!r}{told}"

    def _check(self, img: Any, cam: Any, labels: Any) -> Tuple[Tensor, Tensor, Tensor]:
        img, cam, labels = check_batch(
            img, cam, labels, len(self.classes), self.background_channel, self.image_stats, self.normalise is None
        )
        if not self.device == self._encoder.device == cam.device:
            self.to(cam.device)
        return img, cam, labels

    def _clip_images(self, img: Tensor) -> Tensor:
        """Images (B, 3, H, W) at CLIP's size, with CLIP's statistics (or the host's, as the reference)."""
        x = regions.resize_image(img, self._encoder.image_size)
        return regions.change_stats(x, self.image_stats, (self._encoder.mean, self._encoder.std)) if self.clip_stats else x

    def _views(self, img: Tensor, cam: Tensor, pairs: Tensor, eps: float) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:
        """Normalised CAM (P, S, S), and foreground and background views (P, 3, S, S) of the pairs."""
        size = self._encoder.image_size
        kept = regions.pair_masks(cam, pairs, (size, size), self.normalise, eps)
        return kept, regions.split(self._clip_images(img), kept, pairs)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_prompt_cache": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "PromptRefiner":
        # Follow moves between devices, not changes of precision: `host.half()` must not round prompts or text features.
        device = fn(self.text_features).device
        super()._apply(lambda tensor: tensor.to(device), *args, **kwargs)
        self._encoder.to(device)
        return self


def _recipe(recipe: Union[str, Recipe]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in _RECIPES:
        raise ValueError(f"`recipe` must be {', '.join(map(repr, _RECIPES))} or a Recipe; got {recipe!r}.")
    return _RECIPES[recipe]


def _clusters(clusters: Any, classes: Sequence[str]) -> Optional[CategoryClusters]:
    if clusters is None:
        return None
    if isinstance(clusters, CategoryClusters):
        return clusters.ordered(classes)
    if not isinstance(clusters, Mapping):
        raise TypeError(
            "`clusters` must be CategoryClusters or a mapping cluster name -> classes; got "
            f"{type(clusters).__name__}. From a file: CategoryClusters.from_file(path, classes)."
        )
    return CategoryClusters(clusters, classes, {"source": "mapping"})


def _hand_written(
    texts: Union[None, Sequence[str], Mapping[str, Sequence[str]]], classes: Sequence[str]
) -> Tuple[List[str], Tensor]:
    """All hand-written background prompts (K), and which class has which (C, K)."""
    if isinstance(texts, str):
        raise TypeError(f"`background_texts` must be a list or a mapping class name -> list; got the string {texts!r}.")
    if isinstance(texts, Mapping):
        unknown = sorted(set(texts) - set(classes))
        if unknown:
            raise ValueError(f"`background_texts` must name known classes; got {', '.join(map(repr, unknown))}.")
        given = dict(texts)
    else:
        given = dict.fromkeys(classes, list(texts or ()))
    for name, own in given.items():
        if isinstance(own, str):
            raise TypeError(
                f"`background_texts` must hold a list of texts for every class; got the string {own!r} for {name!r}."
            )
    table = {name: list(given.get(name, ())) for name in classes}
    every = list(dict.fromkeys(text for own in table.values() for text in own))
    owner = torch.zeros(len(classes), len(every))
    for k, name in enumerate(classes):
        for text in table[name]:
            owner[k, every.index(text)] = 1
    return every, owner


def _gather(features: Tensor, pairs: Tensor) -> Tuple[Tensor, Tensor]:
    """All processes' features and pairs, images numbered through, in rank order; as they are without processes."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return features, pairs
    shares: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (features, pairs))
    start, numbered = 0, []
    for _, share in shares:
        numbered.append(share + torch.tensor([start, 0]))
        start += int(share[:, 0].max()) + 1 if len(share) else 0
    return torch.cat([f for f, _ in shares]), torch.cat(numbered)


def _broadcast(context: Tensor) -> None:
    """Rank 0's prompts to all: the same data and seed give the same prompts, up to the machines' rounding."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shared = context.detach().cuda() if dist.get_backend() == "nccl" else context.detach().clone()
        dist.broadcast(shared, 0)
        with torch.no_grad():
            context.copy_(shared)
