"""The demo's model: a π0 of 2.3 million parameters, and how its weights become a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pi0_engine.checkpoints.names import openpi_name
from pi0_engine.config import GemmaConfig, Pi0Config, SiglipConfig
from pi0_engine.demo.make_tokenizer import VOCABULARY
from pi0_engine.demo.scene import FRAME_SIZE
from pi0_engine.reference.model import Pi0Reference
from pi0_engine.robots.normalization import Normalizer

#: 64 patches of 8 x 8 pixels per camera: 1.5 cm of the table to a pixel, 12 to a patch.
CONFIG = Pi0Config(
    "pi0",
    vision=SiglipConfig(width=128, depth=4, num_heads=4, mlp_dim=384, patch_size=8, image_size=FRAME_SIZE),
    llm=GemmaConfig(128, 4, 384, num_heads=4, num_kv_heads=1, head_dim=32, vocab_size=VOCABULARY),
    expert=GemmaConfig(128, 4, 384, num_heads=4, num_kv_heads=1, head_dim=32),
    action_dim=8,
    max_token_len=16,
    action_horizon=16,
)
#: Where a checkpoint has its statistics, as openpi's: ``assets/ASSET/norm_stats.json``.
ASSET = "metaworld"


def initialized(config: Pi0Config, seed: int) -> Pi0Reference:
    """A float32 model to be trained. Embeddings are so large that the prefix's tokens begin at unit size."""
    torch.manual_seed(seed)
    model = Pi0Reference(config).train()
    nn.init.normal_(model.llm.embed_tokens.weight, std=1 / math.sqrt(config.llm.width))
    nn.init.normal_(model.vision.position_embedding.weight, std=0.3)
    return model


def save_checkpoint(
    folder: Path,
    model: Pi0Reference,
    state: dict[str, list[float]],
    actions: dict[str, list[float]],
    tokenizer: bytes,
) -> None:
    """Write an openpi checkpoint in the PyTorch layout, with weights in bfloat16 and the tokenizer beside them.

    The file of weights is written whole or not at all.

    Args:
        state, actions: ``mean``, ``std``, ``q01`` and ``q99`` of each dimension.
        tokenizer: the sentencepiece model that the weights were trained with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        openpi_name(name): tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.named_parameters()
    }
    partial = folder / "model.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    stats = folder / "assets" / ASSET / "norm_stats.json"
    stats.parent.mkdir(parents=True, exist_ok=True)
    stats.write_text(json.dumps({"norm_stats": {"state": state, "actions": actions}}, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)


def normalizer(statistics: dict[str, list[float]]) -> Normalizer:
    """How π0 normalises with these statistics."""
    return Normalizer.zscore(statistics["mean"], statistics["std"])
