"""Pi0Config, EngineConfig, and what a checkpoint's shapes say about a model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pi0_engine.checkpoints.parameters import infer_config, parameter_shapes
from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import EngineConfig, ModelType, Pi0Config
from tests.support import golden
from tests.support.models import MODEL_TYPES, small_config


def test_published_sizes() -> None:
    pi0, pi05 = Pi0Config.load("pi0"), Pi0Config.load("pi05")
    assert (pi0.vision.width, pi0.vision.depth, pi0.vision.num_heads, pi0.vision.mlp_dim) == (1152, 27, 16, 4304)
    assert (pi0.vision.head_dim, pi0.vision.num_patches, pi0.vision.patch_dim) == (72, 256, 588)
    assert (pi0.llm.width, pi0.llm.depth, pi0.llm.mlp_dim, pi0.llm.vocab_size) == (2048, 18, 16384, 257152)
    assert (pi0.expert.width, pi0.expert.depth, pi0.expert.mlp_dim, pi0.expert.vocab_size) == (1024, 18, 4096, None)
    for tower in (pi0.llm, pi0.expert):
        assert (tower.num_heads, tower.num_kv_heads, tower.head_dim) == (8, 1, 256)
        assert (tower.q_dim, tower.kv_dim) == (2048, 256)
    assert (pi0.action_dim, pi0.action_horizon, pi0.num_steps) == (32, 50, 10)
    assert (pi0.token_capacity, pi05.token_capacity) == (48, 200)
    assert (pi0.discrete_state_input, pi05.discrete_state_input) == (False, True)
    assert dataclasses.replace(pi05, model_type="pi0", max_token_len=48, discrete_state_input=False) == pi0


@pytest.mark.parametrize(("model_type", "action_parameters"), [("pi0", 314_713_120), ("pi05", 430_098_464)])
def test_number_of_parameters(model_type: ModelType, action_parameters: int) -> None:
    """PaliGemma 3B, and the expert with its projections, as openpi's state dicts count them (without output layers)."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(Pi0Config(model_type)).items()}
    paligemma = sum(n for name, n in sizes.items() if name.startswith(("vision.", "projector.", "llm.")))
    assert paligemma == 2_923_335_408
    assert sum(sizes.values()) - paligemma == action_parameters


@pytest.mark.parametrize("name", ["pi0", "pi05", "tiny pi0", "tiny pi05"])
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    model = name.split()[-1]
    config = Pi0Config.load(golden.GOLDEN / f"{model}_tiny.json" if "tiny" in name else model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert Pi0Config.load(path) == config
    assert "vocab_size" not in config.to_dict()["expert"]


def changed(**changes: Any) -> dict[str, Any]:
    """The tiny π0 config as JSON data with some keys replaced; ``tower__size`` reaches into a tower."""
    data: dict[str, Any] = json.loads((golden.GOLDEN / "pi0_tiny.json").read_text())
    for key, value in changes.items():
        tower, _, size = key.partition("__")
        if size:
            data[tower][size] = value
        else:
            data[tower] = value
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "pi1"}, "model_type is 'pi1', expected 'pi0' or 'pi05'"),
        ({"layers": 3}, r"config: unknown keys \['layers'\], missing keys \[\]"),
        ({"vision__heads": 3}, r"config\.vision: unknown keys \['heads'\]"),
        ({"vision": None}, r"config\.vision is NoneType, expected an object"),
        ({"vision": {"width": 96}}, r"config\.vision: .*missing keys \['depth', 'num_heads', 'mlp_dim'\]"),
        ({"vision__width": "96"}, r"vision\.width is '96', expected a positive integer"),
        ({"vision__width": 97}, r"vision\.width 97 is not a multiple of vision\.num_heads 4"),
        ({"vision__image_size": 225}, r"vision\.image_size 225 is not a multiple of patch_size 14"),
        ({"llm__depth": 0}, r"llm\.depth is 0, expected a positive integer"),
        ({"llm__depth": 4}, r"llm\.depth is 4 and expert\.depth is 3: .* must be equal"),
        ({"expert__num_kv_heads": 2}, r"llm\.num_kv_heads is 1 and expert\.num_kv_heads is 2"),
        ({"llm__num_kv_heads": 3, "expert__num_kv_heads": 3}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"llm__head_dim": 31, "expert__head_dim": 31}, "head_dim 31 is odd"),
        ({"llm__vocab_size": None}, r"llm\.vocab_size is missing"),
        ({"expert__width": 47}, r"expert\.width 47 is odd"),
        ({"model_type": ["pi0"]}, r"model_type is \['pi0'\], expected"),
        ({"action_dim": True}, "action_dim is True, expected a positive integer"),
        ({"action_dim": 0}, "action_dim is 0, expected a positive integer"),
        ({"num_steps": 2.5}, r"num_steps is 2\.5, expected a positive integer"),
        ({"max_token_len": -1}, "max_token_len is -1, expected a positive integer"),
    ],
)
def test_an_unusable_config_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pi0Config.from_dict(changed(**changes))


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"missing keys \['model_type'\]"):
        Pi0Config.from_dict({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "config is list, expected an object"),
        (None, "is neither 'pi0', 'pi05' nor a file"),
        ("{", "is not JSON"),
    ],
)
def test_an_unreadable_config_file_says_why(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Pi0Config.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype is 'int8', expected one of \['auto', 'float32', 'bfloat16', 'float16'\]"),
        ({"prompt_bucket": 0}, "prompt_bucket is 0, expected "),
        ({"prompt_bucket": 1.5}, r"prompt_bucket is 1\.5, expected an integer of at least 1"),
        ({"backend": "cuda"}, r"backend is 'cuda', expected one of \['auto', 'torch', 'triton'\]"),
        ({"attention": "cudnn"}, r"attention is 'cudnn', expected one of \['auto', 'torch', 'triton', 'flash_attn'\]"),
        ({"max_plans": 0}, "max_plans is 0, expected "),
        ({"solver": "heun"}, r"solver is 'heun', expected one of \['euler', 'midpoint', 'adams_bashforth'\]"),
    ],
)
def test_unusable_engine_options_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_published_sizes_are_inferred_from_shapes(model_type: ModelType) -> None:
    config = Pi0Config(model_type)
    assert infer_config(parameter_shapes(config)) == config


def test_other_sizes_of_the_family_are_inferred() -> None:
    config = Pi0Config.from_dict(changed(vision__width=144, vision__num_heads=2, action_dim=14, max_token_len=48))
    assert infer_config(parameter_shapes(config)) == config


def test_what_shapes_do_not_tell_is_asked_for() -> None:
    with pytest.raises(ValueError, match="cannot infer the number of vision heads from a vision width of 36"):
        infer_config(parameter_shapes(small_config("pi0")))


@pytest.mark.parametrize(
    "name", ["vision.patch_embedding.weight", "llm.layers.0.q_proj.weight", "action_in_proj.weight"]
)
def test_a_tensor_that_is_needed_to_infer_is_named(name: str) -> None:
    shapes = parameter_shapes(Pi0Config("pi0"))
    del shapes[name]
    with pytest.raises(ValueError, match=f"cannot infer the model's sizes: tensor '{name}' is missing"):
        infer_config(shapes)


@pytest.mark.parametrize("shape", [(1152, 588), (), (0, 3, 14, 14)])
def test_a_tensor_of_another_kind_is_named(shape: tuple[int, ...]) -> None:
    shapes = {**parameter_shapes(Pi0Config("pi0")), "vision.patch_embedding.weight": shape}
    with pytest.raises(ValueError, match=r"'vision\.patch_embedding\.weight' is \[.*\], expected 4 axes"):
        infer_config(shapes)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parameter_names_are_the_references(model_type: ModelType) -> None:
    """parameters.py and the reference model say the same about names and shapes."""
    from tests.support.models import reference

    config = small_config(model_type)
    assert {n: tuple(p.shape) for n, p in reference(config).named_parameters()} == parameter_shapes(config)
    assert set(RandomCheckpoint(config).shapes) == set(parameter_shapes(config))
