"""What a model is (``Pi0Config``) and how the engine runs it (``EngineConfig``): frozen data, nothing else.

Sizes and defaults are those of openpi's ``models/gemma.py``, ``models/siglip.py`` and ``models/pi0_config.py``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

ModelType = Literal["pi0", "pi05"]

#: Camera slots in the order in which their tokens enter the prefix (openpi, preprocessing_pytorch.py).
CAMERA_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class SiglipConfig:
    """SigLIP vision tower: a pre-LN transformer over image patches. Lengths in pixels."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 14
    image_size: int = 224

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        """Tokens per camera: (224 / 14)^2 = 256 in every published checkpoint."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values in one RGB patch: 3 * 14 * 14 = 588."""
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma decoder. ``head_dim`` is independent of ``width``; only the language model has a ``vocab_size``."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int | None = None

    @property
    def q_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim


SO400M = SiglipConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304)
GEMMA_2B = GemmaConfig(2048, 18, 16384, num_heads=8, num_kv_heads=1, head_dim=256, vocab_size=257152)
GEMMA_300M = GemmaConfig(1024, 18, 4096, num_heads=8, num_kv_heads=1, head_dim=256)
_MAX_TOKEN_LEN = {"pi0": 48, "pi05": 200}


@dataclass(frozen=True)
class Pi0Config:
    """A π0 or π0.5 model.

    Args:
        model_type: ``"pi0"`` (state token, action-time MLP) or ``"pi05"`` (state in the prompt, adaRMS expert).
        vision, llm, expert: the three towers.
        action_dim: width of padded state and action vectors (32 in every published checkpoint).
        max_token_len: prompt capacity in tokens; ``None`` takes 48 for π0, 200 for π0.5.
        action_horizon: actions per chunk.
        num_steps: flow steps per chunk.
        discrete_state_input: whether the prompt carries the discretised state; ``None`` means "π0.5 does".
            ``pi05_libero`` sets it to false and then sees no state at all.

    Raises:
        ValueError: a size that is not positive, towers that cannot share attention, or an unknown model type.
    """

    model_type: ModelType
    vision: SiglipConfig = SO400M
    llm: GemmaConfig = GEMMA_2B
    expert: GemmaConfig = GEMMA_300M
    action_dim: int = 32
    max_token_len: int | None = None
    action_horizon: int = 50
    num_steps: int = 10
    discrete_state_input: bool | None = None

    def __post_init__(self) -> None:
        if self.model_type not in list(_MAX_TOKEN_LEN):  # a list: JSON may bring something unhashable
            raise ValueError(f"model_type is {self.model_type!r}, expected 'pi0' or 'pi05'")
        if self.max_token_len is None:
            object.__setattr__(self, "max_token_len", _MAX_TOKEN_LEN[self.model_type])
        if self.discrete_state_input is None:
            object.__setattr__(self, "discrete_state_input", self.model_type == "pi05")
        _check(self)

    @property
    def is_pi05(self) -> bool:
        return self.model_type == "pi05"

    @property
    def token_capacity(self) -> int:
        """``max_token_len`` as a plain integer (it is resolved when the config is made)."""
        assert self.max_token_len is not None
        return self.max_token_len

    def to_dict(self) -> dict[str, Any]:
        """The JSON schema that :meth:`from_dict` reads; a missing ``vocab_size`` is left out."""
        out = dataclasses.asdict(self)
        if out["expert"]["vocab_size"] is None:
            del out["expert"]["vocab_size"]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Pi0Config:
        """Strict: an unknown or missing key raises ValueError naming it."""
        values = dict(data) if isinstance(data, dict) else data
        towers = {"vision": SiglipConfig, "llm": GemmaConfig, "expert": GemmaConfig}
        for name, kind in towers.items():
            if isinstance(values, dict) and name in values:
                values[name] = _build(kind, values[name], f"config.{name}")
        return _build(cls, values, "config")

    @classmethod
    def load(cls, source: str | Path) -> Pi0Config:
        """``"pi0"``, ``"pi05"`` (full size) or the path of a JSON file in the schema of :meth:`to_dict`."""
        if str(source) in _MAX_TOKEN_LEN:
            return cls(str(source))  # type: ignore[arg-type]
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"config {str(source)!r} is neither 'pi0', 'pi05' nor a file")
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"config {path} is not JSON: {error}") from error
        return cls.from_dict(data)


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
BackendName = Literal["auto", "torch", "triton"]
AttentionName = Literal["auto", "torch", "triton", "flash_attn"]
FlowTimes = Literal["openpi", "lerobot"]
SolverName = Literal["euler", "midpoint", "adams_bashforth"]


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model.

    Args:
        device: a torch device string, ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` (which ends at 65504) or ``"auto"`` (bfloat16 where the
            processor does not multiply float32 clearly faster, measured once: kernels/gemm.py).
        backend: ``"auto"``, or the name of an op implementation; a named one that is unavailable raises.
        attention: implementation of vision and prefix attention where it is to be another one than the backend's.
        use_cuda_graph: on a GPU, replay captured graphs; without them every stage is timed by itself.
        prompt_bucket: prompt lengths are rounded up to a multiple of this, so that prompts share a plan and its graph.
            None takes 16 on a GPU, and 1 on a CPU, where a new shape costs nothing and padding does.
        max_plans: how many sets of working buffers and graphs (one per shape) are kept before the oldest is freed.
        launch_configs: a JSON file of launch configurations (``pi0-engine tune`` writes them) instead of those shipped.
        flow_times: whose rounding of the flow steps' times is followed; see ``engine.solvers.flow_grid``.
        solver: how the flow is integrated: ``"euler"`` as published, or of second order ``"midpoint"``, which calls the
            network twice per flow step, or ``"adams_bashforth"``, once (docs/solvers.md).
        nvtx: mark stages, layers and ops for NVIDIA's profilers; only seen without a CUDA graph.
    """

    device: str = "cpu"
    dtype: DtypeName = "auto"
    backend: BackendName = "auto"
    attention: AttentionName = "auto"
    use_cuda_graph: bool = True
    prompt_bucket: int | None = None
    max_plans: int = 8
    launch_configs: str | None = None
    flow_times: FlowTimes = "openpi"
    solver: SolverName = "euler"
    nvtx: bool = False

    def __post_init__(self) -> None:
        named = {
            "dtype": DtypeName,
            "backend": BackendName,
            "attention": AttentionName,
            "flow_times": FlowTimes,
            "solver": SolverName,
        }
        for name, kind in named.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {list(get_args(kind))}")
        if self.prompt_bucket is not None and not _is_positive_integer(self.prompt_bucket):
            raise ValueError(f"prompt_bucket is {self.prompt_bucket!r}, expected an integer of at least 1, or None")
        if not _is_positive_integer(self.max_plans):
            raise ValueError(f"max_plans is {self.max_plans!r}, expected an integer of at least 1")


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {type(values).__name__}, expected an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [n for n in required if n not in values]
    if unknown or missing:
        raise ValueError(f"{where}: unknown keys {unknown}, missing keys {missing}; expected {sorted(fields)}")
    return kind(**values)


def _check(config: Pi0Config) -> None:
    for tower_name in ("vision", "llm", "expert"):
        for name, value in dataclasses.asdict(getattr(config, tower_name)).items():
            if value is not None and not _is_positive_integer(value):
                raise ValueError(f"{tower_name}.{name} is {value!r}, expected a positive integer")
    for name in ("action_dim", "max_token_len", "action_horizon", "num_steps"):
        value = getattr(config, name)
        if not _is_positive_integer(value):
            raise ValueError(f"{name} is {value!r}, expected a positive integer")
    vision, llm, expert = config.vision, config.llm, config.expert
    if vision.width % vision.num_heads:
        raise ValueError(f"vision.width {vision.width} is not a multiple of vision.num_heads {vision.num_heads}")
    if vision.image_size % vision.patch_size:
        raise ValueError(f"vision.image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}")
    for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(llm, name) != getattr(expert, name):
            raise ValueError(
                f"llm.{name} is {getattr(llm, name)} and expert.{name} is {getattr(expert, name)}: "
                "the expert attends to the language model's keys and values, so they must be equal"
            )
    if llm.num_heads % llm.num_kv_heads:
        raise ValueError(f"num_heads {llm.num_heads} is not a multiple of num_kv_heads {llm.num_kv_heads}")
    if llm.head_dim % 2:
        raise ValueError(f"head_dim {llm.head_dim} is odd; RoPE rotates pairs")
    if expert.width % 2:
        raise ValueError(f"expert.width {expert.width} is odd; the time embedding is half sines, half cosines")
    if llm.vocab_size is None:
        raise ValueError("llm.vocab_size is missing")


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
