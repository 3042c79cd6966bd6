"""How many of open_clip's configurations the package takes: every name of `open_clip.list_models()`, with random weights.

    OMP_NUM_THREADS=1 python benchmarks/clip_configs.py            # needs open_clip and timm; downloads nothing

Texts: the configuration's own text tower with one layer and a small real tokenizer of its kind (open_clip's BPE where it has
that), beside a small image tower. A configuration counts if text features agree with open_clip's `encode_text` to 1e-5, and a
prompt made of a text's own token embeddings with that text. Images: the configuration's own image tower in full size on torch's
meta device, which computes shapes only; `images` counts towers that return (N, D), `dense` those that return (N, D, g, g).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from semples_plugin import ClipError
from semples_plugin.clip_backends import load_clip
from tests.clip_zoo import bert_tokenizer, tower_config, word_tokenizer

TEXTS = ["a photo of the boat", "water", "red train on rails"]
SMALL = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
KINDS = {"roberta-base": "roberta", "xlm-roberta-base": "roberta", "xlm-roberta-large": "roberta"}
KINDS.update({"google/mt5-base": "mt5", "google/mt5-xl": "mt5"})
KINDS.update({f"facebook/nllb-200-distilled-{size}": "m2m" for size in ("600M", "1.3B")})


def small_tokenizer(text: Dict[str, Any], folder: Path) -> Any:
    """The tokenizer that open_clip would make for the configuration, with small files in place of the hub's."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs", {})
    if "hf_tokenizer_name" not in text:
        return SimpleTokenizer(context_length=length, **options)
    if text["hf_tokenizer_name"] == "bert-base-uncased":
        bert_tokenizer(folder)
    else:
        word_tokenizer(folder, "<pad>", "<eos>")
    return HFTokenizer(str(folder), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options)


def small_text(text: Dict[str, Any], tokenizer: Any, folder: Path) -> Dict[str, Any]:
    """One layer; the vocabulary is the tokenizer's."""
    text = {**copy.deepcopy(text), "layers": 1}
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        text.update(vocab_size=len(inner), eos_id=inner.eos_token_id if inner.eos_token_id is not None else 0)
    if "hf_model_name" in text:
        tower_config(KINDS[text["hf_model_name"]], inner).save_pretrained(str(folder))
        text.update(hf_model_name=str(folder), hf_model_pretrained=False)
    return text


def examine(name: str, folder: Path) -> Dict[str, str]:
    """What the package says to one configuration: "yes", or why not."""
    import open_clip

    config = open_clip.get_model_config(name)
    tokenizer = small_tokenizer(config["text_cfg"], folder)
    make = open_clip.model.CustomTextCLIP if config.get("custom_text") else open_clip.model.CLIP
    if "hf_model_name" in config["text_cfg"]:
        make = open_clip.model.CustomTextCLIP
    more: Dict[str, Any] = {"quick_gelu": config.get("quick_gelu", False)}
    text, vision = small_text(config["text_cfg"], tokenizer, folder), dict(SMALL)
    if "multimodal_cfg" in config:
        make, more = open_clip.coca_model.CoCa, {**more, "multimodal_cfg": {**config["multimodal_cfg"], "layers": 1}}
        text["output_tokens"] = True
        vision.update(attentional_pool=True, attn_pooler_heads=2, output_tokens=True)
    model = make(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text, **more).eval()
    try:
        encoder = load_clip(model, tokenizer=tokenizer)
    except ClipError as error:
        return dict.fromkeys(("texts", "prompts", "images", "dense"), str(error))
    with torch.no_grad():
        own = model.encode_text(tokenizer(TEXTS, encoder.context_length), normalize=False)
        gap = (encoder.encode_text(TEXTS) - own).abs().max() / own.abs().max().clamp(max=1)
        words = torch.tensor([encoder.token_ids(" boat")])
        embedding = model.get_submodule(embedding_path(model))
        prompt = encoder.encode_prompt(embedding(words), "a photo of the {}")
        gap_of_prompt = (prompt - own[:1]).abs().max() / own.abs().max().clamp(max=1)
    found = {"texts": "yes" if gap < 1e-5 else f"differs by {gap:.0e}"}
    found["prompts"] = "yes" if gap_of_prompt < 1e-5 else f"differs by {gap_of_prompt:.0e}"
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    with torch.device("meta"):
        tower = type(model)(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text, **more)
    encoder.model.visual = tower.visual.eval()
    size = tower.visual.image_size
    size = size[0] if isinstance(size, (tuple, list)) else size
    views = torch.zeros(2, 3, size, size, device="meta")
    for column, call in (("images", encoder.encode_image), ("dense", encoder.encode_dense)):
        try:
            shape = tuple(call(views).shape)
            expected = shape[:2] == (2, config["embed_dim"]) and len(shape) == (2 if column == "images" else 4)
            found[column] = "yes" if expected else f"shape {shape}"
        except ClipError as error:
            found[column] = str(error)
    return found


def embedding_path(model: Any) -> str:
    names = ("token_embedding", "word_embeddings", "embed_tokens")
    return next(name for name, _ in model.named_modules(remove_duplicate=False) if name.split(".")[-1] in names)


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="configurations; by default all that open_clip lists")
    options = parser.parse_args(arguments)
    import open_clip

    warnings.simplefilter("ignore")
    counts: Counter = Counter()
    names: List[str] = options.names or open_clip.list_models()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            try:
                found = examine(name, Path(folder))
            except Exception as error:  # one that cannot be built does not end the count
                found = dict.fromkeys(("texts", "prompts", "images", "dense"), f"{type(error).__name__}: {error}")
        counts.update(column for column, value in found.items() if value == "yes")
        reasons = {column: value for column, value in found.items() if value != "yes"}
        print(f"{name}: {reasons or 'yes'}", flush=True)
    print(f"of {len(names)}: " + ", ".join(f"{column} {counts[column]}" for column in ("texts", "prompts", "images", "dense")))


if __name__ == "__main__":
    main()
