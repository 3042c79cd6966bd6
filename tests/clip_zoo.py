"""Small random models of the real classes of OpenAI's clip, open_clip and transformers, with real small tokenizers.

`case(kind, folder)` makes one; `KINDS` says which there are. Nothing is downloaded; a kind whose package is missing is skipped.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import pytest
import torch
from torch import Tensor, nn

from semples_plugin.clip_backends import load_clip, openai_clip_module
from semples_plugin.clip_encoder import ClipEncoder

WORDS = "a photo of the boat train bird water rails sky red old small big . , on in"
CONTEXT = 32  # text positions of the towers that are padded


class Case(NamedTuple):
    """One model.

    Attributes:
        kind: its name in `KINDS`.
        model: as its package makes it.
        tokenizer: what `load_clip(model, tokenizer=...)` gets; None for OpenAI's.
        image: (N, 3, S, S) to features by the package.
        text: texts to features by the package, padded as the package says.
    """

    kind: str
    model: nn.Module
    tokenizer: Any
    image: Callable[[Tensor], Tensor]
    text: Callable[[Sequence[str]], Tensor]

    def load(self, **options: Any) -> ClipEncoder:
        if self.tokenizer is not None:
            options["tokenizer"] = self.tokenizer
        return load_clip(self.model, **options)


# ------------------------------------------------------------------------------------------------ tokenizers


def clip_tokenizer(folder: Path) -> Any:
    """`transformers.CLIPTokenizer`: bytes, and merges that make words of the first letters."""
    transformers = pytest.importorskip("transformers")
    units = list(openai_clip_module("simple_tokenizer").bytes_to_unicode().values())
    merges = ["b o", "bo a", "boa t</w>", "t r", "a i", "i n</w>"]
    vocab = units + [unit + "</w>" for unit in units] + [merge.replace(" ", "") for merge in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def word_tokenizer(folder: Path, pad: str, eos: str) -> Any:
    """A tokenizer of whole words in lower case that ends a text with its end token, as SigLIP's, with no start token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = [pad] if pad == eos else [pad, eos]
    vocab = {word: i for i, word in enumerate(["<unk>", *special, *WORDS.split()])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Lowercase()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, vocab[eos])])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token=pad, eos_token=eos)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def siglip2_tokenizer(folder: Path, side: str = "right", name: str = "Siglip2Tokenizer") -> Any:
    """`transformers.Siglip2Tokenizer`: letters, and merges that make one word; spaces belong to what follows them.

    Or `GemmaTokenizer`, which leaves capitals as they are; the published folders of SigLIP 2 name it.
    """
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Siglip2Tokenizer"):  # transformers 4
        tokenizer = word_tokenizer(folder, "<pad>", "<eos>")
        tokenizer.padding_side = side
        return tokenizer
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz.,▁"})
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, "bo", "boa", "boat"]
    merges = [("b", "o"), ("bo", "a"), ("boa", "t")]
    vocab = {token: i for i, token in enumerate(tokens)}
    return getattr(transformers, name)(vocab, merges, add_bos_token=False, add_eos_token=True, padding_side=side)


def bert_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(str(folder))
    return tokenizer


# ------------------------------------------------------------------------------------------------ models


def _openai(*args: Any) -> Case:
    module = openai_clip_module("model").CLIP(*args).eval()
    bpe = openai_clip_module("simple_tokenizer").SimpleTokenizer()

    def text(texts: Sequence[str]) -> Tensor:
        rows = [[49406, *bpe.encode(one), 49407] for one in texts]
        return module.encode_text(torch.tensor([row + [0] * (77 - len(row)) for row in rows]))

    return Case("", module, None, module.encode_image, text)


def _hugging_face(name: str, folder: Path) -> Case:
    transformers = pytest.importorskip("transformers")
    sizes: Dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128
    }  # fmt: skip
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    if name == "clip":
        tokenizer = clip_tokenizer(folder)
        text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
        text.update(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
        model, length = transformers.CLIPModel(config), 77
    elif name == "metaclip2":
        if not hasattr(transformers, "MetaClip2Model"):
            pytest.skip("this transformers has no MetaClip2Model")
        tokenizer, length = word_tokenizer(folder, "<pad>", "<eos>"), CONTEXT
        text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "bos_token_id": None}
        text.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        config = transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=32)
        model = transformers.MetaClip2Model(config)
    else:
        if name == "siglip":
            tokenizer = word_tokenizer(folder, "</s>", "</s>")
        else:
            tokenizer = siglip2_tokenizer(folder, name="Siglip2Tokenizer" if name == "siglip2_naflex" else "GemmaTokenizer")
        text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "projection_size": 64}
        text.update(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        if name == "siglip2_naflex":
            vision = {**sizes, "num_patches": 16, "patch_size": 8}
            model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
        else:
            model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        length = CONTEXT
    model = model.eval()

    def tensor(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.pooler_output

    def encode_text(texts: Sequence[str]) -> Tensor:
        if name.startswith("siglip"):  # trained on texts in lower case
            texts = [text.lower() for text in texts]
        tokens = tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt")
        return tensor(model.get_text_features(input_ids=tokens["input_ids"]))

    def encode_image(views: Tensor) -> Tensor:
        if name != "siglip2_naflex":
            return tensor(model.get_image_features(pixel_values=views))
        patches = torch.stack([_patches(view, 8) for view in views])
        shapes = torch.tensor([[4, 4]] * len(views))
        mask = torch.ones(len(views), 16, dtype=torch.long)
        return tensor(model.get_image_features(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes))

    return Case("", model, tokenizer, encode_image, encode_text)


def _patches(view: Tensor, size: int) -> Tensor:
    """transformers' own cutting of an image (3, H, W) into patches (P, size * size * 3)."""
    folder = "transformers.models.siglip2"
    names = (f"{folder}.image_processing_pil_siglip2", f"{folder}.image_processing_siglip2")  # in transformers 5, in 4
    module = pytest.importorskip(next((name for name in names if importlib.util.find_spec(name)), names[0]))
    return torch.from_numpy(_cut(module, view, size).copy())


def _cut(module: Any, view: Tensor, size: int) -> Any:
    if module.__name__.endswith("pil_siglip2"):
        return module.convert_image_to_patches(view.numpy(), size)  # channels first
    return module.convert_image_to_patches(view.permute(1, 2, 0).numpy(), size)


VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": CONTEXT, "width": 64, "heads": 2, "layers": 2}


def _open_clip(name: str, folder: Path) -> Case:
    open_clip = pytest.importorskip("open_clip")
    tokenizer: Any = open_clip.tokenizer.SimpleTokenizer(context_length=CONTEXT)
    text: Dict[str, Any] = {**TEXT, "vocab_size": 49408}
    vision: Dict[str, Any] = dict(VIT)
    make: Any = open_clip.model.CustomTextCLIP
    more: Dict[str, Any] = {}
    if name == "causal":
        make = open_clip.model.CLIP
    elif name == "coca":
        make, more = (
            open_clip.coca_model.CoCa,
            {"multimodal_cfg": {"width": 64, "heads": 2, "layers": 1, "context_length": CONTEXT}},
        )
        text.update(embed_cls=True, output_tokens=True)
        vision.update(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=8, output_tokens=True)
    elif name == "mobileclip":
        text["no_causal_mask"] = True
        vision = {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None, "image_size": 64}
    elif name == "clipa":
        bert_tokenizer(folder)
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT, strip_sep_token=True)
        text.update(no_causal_mask=True, pool_type="last", vocab_size=len(tokenizer.tokenizer))
        vision.update(pool_type="avg", no_ln_pre=True)
    elif name == "clips":
        word = word_tokenizer(folder, "<pad>", "<eos>")
        word.add_special_tokens({"bos_token": "<bos>", "cls_token": "<cls>"})
        word.save_pretrained(str(folder))
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT, tokenizer_mode="clips")
        text.update(pool_type="last", vocab_size=len(tokenizer.tokenizer))
    elif name == "worldwide":
        word_tokenizer(folder, "<pad>", "</s>")
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT, clean="canonicalize")
        text.update(pool_type="eos", vocab_size=len(tokenizer.tokenizer), eos_id=tokenizer.tokenizer.eos_token_id)
    elif name == "siglip":
        word_tokenizer(folder, "</s>", "</s>")
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT, clean="canonicalize")
        text.update(no_causal_mask=True, pool_type="last", proj_bias=True, vocab_size=len(tokenizer.tokenizer))
        vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    elif name in TOWERS:
        word_tokenizer(folder, "<pad>", "<eos>")
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT)
        tower_config(name, tokenizer.tokenizer).save_pretrained(str(folder))
        pooler = "mean_pooler" if name in ("roberta", "mt5") else "cls_last_hidden_state_pooler"
        text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "mlp", "hf_pooler_type": pooler}
        vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    if "timm_model_name" in vision:
        timm = pytest.importorskip("timm")
        if vision["timm_model_name"] not in timm.list_models():
            pytest.skip(f"this timm has no {vision['timm_model_name']}")
    model = make(embed_dim=64 if name == "siglip" else 32, vision_cfg=vision, text_cfg=text, **more).eval()

    def encode_text(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(texts), CONTEXT), normalize=False)

    def encode_image(views: Tensor) -> Tensor:
        return model.encode_image(views, normalize=False)

    return Case("", model, tokenizer, encode_image, encode_text)


TOWERS = ("bert", "roberta", "mt5", "m2m")


def tower_config(name: str, tokenizer: Any) -> Any:
    """The configuration of a text tower of transformers, as open_clip builds it."""
    transformers = pytest.importorskip("transformers")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if name == "mt5":
        sizes = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
        return transformers.MT5Config(**sizes, **ids, decoder_start_token_id=0)
    if name == "m2m":
        sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
        sizes.update(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=128)
        return transformers.M2M100Config(**sizes, **ids, decoder_start_token_id=0, init_std=0.1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    kind = transformers.BertConfig if name == "bert" else transformers.RobertaConfig
    return kind(**sizes, **ids, max_position_embeddings=64, initializer_range=0.2)  # the first token must see the others


# ------------------------------------------------------------------------------------------------ all of them


KINDS: Dict[str, Callable[[Path], Case]] = {
    "OpenAI ViT": lambda folder: _openai(32, 32, 2, 64, 8, 77, 49408, 64, 2, 2),
    "OpenAI ResNet": lambda folder: _openai(32, 64, (1, 1, 1, 1), 64, None, 77, 49408, 64, 2, 2),
    "open_clip, causal text": lambda folder: _open_clip("causal", folder),
    "open_clip CoCa": lambda folder: _open_clip("coca", folder),
    "open_clip MobileCLIP": lambda folder: _open_clip("mobileclip", folder),
    "open_clip CLIPA": lambda folder: _open_clip("clipa", folder),
    "open_clip CLIPS": lambda folder: _open_clip("clips", folder),
    "open_clip worldwide": lambda folder: _open_clip("worldwide", folder),
    "open_clip SigLIP": lambda folder: _open_clip("siglip", folder),
    "open_clip with BERT (BiomedCLIP)": lambda folder: _open_clip("bert", folder),
    "open_clip with RoBERTa": lambda folder: _open_clip("roberta", folder),
    "open_clip with mT5": lambda folder: _open_clip("mt5", folder),
    "open_clip with M2M-100 (NLLB)": lambda folder: _open_clip("m2m", folder),
    "transformers CLIP": lambda folder: _hugging_face("clip", folder),
    "transformers MetaCLIP 2": lambda folder: _hugging_face("metaclip2", folder),
    "transformers SigLIP": lambda folder: _hugging_face("siglip", folder),
    "transformers SigLIP 2": lambda folder: _hugging_face("siglip2", folder),
    "transformers SigLIP 2, NaFlex": lambda folder: _hugging_face("siglip2_naflex", folder),
}


def case(kind: str, folder: Path) -> Case:
    """The model `kind` with weights from seed 0; its tokenizer's files go into `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = KINDS[kind](folder)
    for module in made.model.modules():  # transformers fills some weights with zeros
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias, std=0.1, generator=torch.Generator().manual_seed(1))
    return made._replace(kind=kind)


def kinds(package: str) -> List[str]:
    return [kind for kind in KINDS if kind.startswith(package)]
