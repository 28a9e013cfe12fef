"""Canonical parameter names and shapes: the one vocabulary of checkpoint, reference, engine and tests.

A linear weight is [out, in]. openpi's and lerobot's names are translated in ``names.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pi0_engine.config import GemmaConfig, ModelType, Pi0Config, SiglipConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: Pi0Config) -> Shapes:
    """Every parameter of the model, {canonical name: shape}."""
    shapes = _vision_shapes(config.vision)
    shapes.update(_linear("projector", config.llm.width, config.vision.width))
    assert config.llm.vocab_size is not None
    shapes["llm.embed_tokens.weight"] = (config.llm.vocab_size, config.llm.width)
    shapes.update(_gemma_shapes("llm", config.llm, adarms=False))
    shapes.update(_gemma_shapes("expert", config.expert, adarms=config.is_pi05))
    width, action_dim = config.expert.width, config.action_dim
    shapes.update(_linear("action_in_proj", width, action_dim))
    shapes.update(_linear("action_out_proj", action_dim, width))
    if config.is_pi05:
        shapes.update(_linear("time_mlp_in", width, width))
        shapes.update(_linear("time_mlp_out", width, width))
    else:
        shapes.update(_linear("state_proj", width, action_dim))
        shapes.update(_linear("action_time_mlp_in", width, 2 * width))
        shapes.update(_linear("action_time_mlp_out", width, width))
    return shapes


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Pi0Config:
    """The model that tensors of these canonical names and shapes belong to.

    What shapes cannot tell is taken from the family: one shared KV head, and 72 channels per vision head (So400m).

    Raises:
        ValueError: names a tensor that is needed and absent, or a size that no rule of the family explains.
    """

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"cannot infer the model's sizes: tensor {name!r} is missing")
        found = tuple(shapes[name])
        if len(found) != axes or min(found) < 1:
            raise ValueError(
                f"cannot infer the model's sizes: {name!r} is {list(found)}, expected {axes} axes, none empty"
            )
        return found

    vision_width, _, patch_size, _ = shape("vision.patch_embedding.weight", axes=4)
    num_patches = shape("vision.position_embedding.weight")[0]
    if vision_width % 72:
        raise ValueError(
            f"cannot infer the number of vision heads from a vision width of {vision_width} "
            "(not a multiple of So400m's 72 channels per head): give a config file"
        )
    side = round(num_patches**0.5)
    model_type: ModelType = "pi05" if "time_mlp_in.weight" in shapes else "pi0"

    def gemma(tower: str, vocab_size: int | None) -> GemmaConfig:
        q_dim, width = shape(f"{tower}.layers.0.q_proj.weight")
        head_dim = shape(f"{tower}.layers.0.k_proj.weight")[0]
        mlp_dim = shape(f"{tower}.layers.0.gate_proj.weight")[0]
        depth = _depth(shapes, tower)
        return GemmaConfig(width, depth, mlp_dim, q_dim // head_dim, 1, head_dim, vocab_size)

    return Pi0Config(
        model_type=model_type,
        vision=SiglipConfig(
            width=vision_width,
            depth=_depth(shapes, "vision"),
            num_heads=vision_width // 72,
            mlp_dim=shape("vision.layers.0.fc1.weight")[0],
            patch_size=patch_size,
            image_size=side * patch_size,
        ),
        llm=gemma("llm", shape("llm.embed_tokens.weight")[0]),
        expert=gemma("expert", None),
        action_dim=shape("action_in_proj.weight")[1],
    )


def _depth(shapes: Mapping[str, tuple[int, ...]], tower: str) -> int:
    prefix = f"{tower}.layers."
    return 1 + max((int(n[len(prefix) :].split(".")[0]) for n in shapes if n.startswith(prefix)), default=-1)


def _linear(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _vision_shapes(c: SiglipConfig) -> Shapes:
    shapes: Shapes = {
        "vision.patch_embedding.weight": (c.width, 3, c.patch_size, c.patch_size),
        "vision.patch_embedding.bias": (c.width,),
        "vision.position_embedding.weight": (c.num_patches, c.width),
    }
    for i in range(c.depth):
        layer = f"vision.layers.{i}"
        for norm in ("norm1", "norm2"):
            shapes[f"{layer}.{norm}.weight"] = (c.width,)
            shapes[f"{layer}.{norm}.bias"] = (c.width,)
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.update(_linear(f"{layer}.{proj}", c.width, c.width))
        shapes.update(_linear(f"{layer}.fc1", c.mlp_dim, c.width))
        shapes.update(_linear(f"{layer}.fc2", c.width, c.mlp_dim))
    shapes["vision.post_norm.weight"] = (c.width,)
    shapes["vision.post_norm.bias"] = (c.width,)
    return shapes


def _gemma_shapes(tower: str, c: GemmaConfig, *, adarms: bool) -> Shapes:
    def norm(name: str) -> Shapes:
        if adarms:  # scale, shift and gate from the flow time: W -> 3W
            return _linear(f"{name}.dense", 3 * c.width, c.width)
        return {f"{name}.weight": (c.width,)}

    shapes: Shapes = {}
    for i in range(c.depth):
        layer = f"{tower}.layers.{i}"
        shapes[f"{layer}.q_proj.weight"] = (c.q_dim, c.width)
        shapes[f"{layer}.k_proj.weight"] = (c.kv_dim, c.width)
        shapes[f"{layer}.v_proj.weight"] = (c.kv_dim, c.width)
        shapes[f"{layer}.o_proj.weight"] = (c.width, c.q_dim)
        shapes[f"{layer}.gate_proj.weight"] = (c.mlp_dim, c.width)
        shapes[f"{layer}.up_proj.weight"] = (c.mlp_dim, c.width)
        shapes[f"{layer}.down_proj.weight"] = (c.width, c.mlp_dim)
        shapes.update(norm(f"{layer}.input_norm"))
        shapes.update(norm(f"{layer}.post_attention_norm"))
    shapes.update(norm(f"{tower}.norm"))
    return shapes
