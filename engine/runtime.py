"""``Engine``: weights, ops and buffers tied together. ``__init__`` is the boot sequence, ``infer`` one inference."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pi0_engine.config import EngineConfig
from pi0_engine.engine import pipeline
from pi0_engine.engine.arrays import as_tensor
from pi0_engine.engine.choices import choose_ops, resolve_device, resolve_dtype, why_unsafe
from pi0_engine.engine.graph import CapturedGraph
from pi0_engine.engine.machine import describe_machine
from pi0_engine.engine.memory import check_free_memory, reporting_memory
from pi0_engine.engine.plan import GPU_PROMPT_BUCKET, ShapePlan
from pi0_engine.engine.session import Session
from pi0_engine.engine.stage_clock import StageClock
from pi0_engine.engine.time_terms import StepTerms, TimeTerms
from pi0_engine.engine.weights import TensorSource, pack_weights
from pi0_engine.images.pack import staging_size
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.inputs import ModelInputs, NotFiniteError
from pi0_engine.kernels.registry import Ops
from pi0_engine.kernels.stream import Scratch
from pi0_engine.rtc.guidance import Continuation, FixedPrefix, Guide, check_guidable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """What one call computed.

    Attributes:
        actions: float32 [B, samples, H, action_dim] on the CPU, normalised; a copy that the caller owns.
        seconds: wall time of each part, in order: ``inputs``, then the stages (``pipeline.STAGES``), or ``replay``
            where a CUDA graph runs them all.
    """

    actions: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """Runs one checkpoint. Its buffers serve one inference at a time: callers in several threads take turns.

    Args:
        source: an opened checkpoint (``open_checkpoint``) or anything with ``config`` and ``tensor(name)``.
        config: device, dtype, backend.
        progress: show a bar while weights are packed.

    Raises:
        ValueError: a device or backend that is not available here, or a checkpoint tensor that cannot be read.
        MemoryError: the GPU has too little free memory; says how much is needed and how much is free.
    """

    def __init__(self, source: TensorSource, config: EngineConfig | None = None, *, progress: bool = False) -> None:
        self.engine_config = config or EngineConfig()
        self.config = source.config
        self.device = resolve_device(self.engine_config.device)
        self.dtype, self.dtype_reason = resolve_dtype(self.engine_config.dtype, self.device)
        self.ops: Ops = choose_ops(self.engine_config, self.device)
        if unsafe := why_unsafe(self.ops, self.device):
            log.warning("%s", unsafe)
        self._resize = FramePreprocessor(size=self.config.vision.image_size)
        check_free_memory(self.config, self.dtype, self.device)
        with reporting_memory(self.device, "the weights"):
            self.weights = pack_weights(source, self.dtype, self.device, progress=progress)
            self.time_terms = TimeTerms(
                source,
                self.weights.expert,
                self.device,
                self.engine_config.flow_times,
                self.engine_config.solver,
            )
            self.time_terms(self.config.num_steps)
            self.scratch = Scratch.allocate(self.device, needed=self.ops.launcher is not None)
        self.use_graph = self.device.type == "cuda" and self.engine_config.use_cuda_graph
        self._sessions: OrderedDict[ShapePlan, Session] = OrderedDict()
        self._observed: tuple[Session, int] | None = None

    def infer(
        self,
        inputs: ModelInputs,
        noise: NDArray[np.float32] | Tensor,
        *,
        num_steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Inference:
        """Draw action chunks.

        Args:
            inputs: a batch of B observations.
            noise: float32 [B, samples, H, action_dim], standard normal, an array or a tensor on the CPU; its shape says
                how many candidate chunks to draw per observation and how long they are.
            num_steps: flow steps of the engine's solver; the checkpoint's own number where None.
            continuation: the chunks that these continue, one per observation; its samples share it (rtc/guidance.py). A
                :class:`Guide` needs the Euler solver.

        Raises:
            ValueError: inputs, noise or a continuation that the model cannot take, or actions that are not finite.
            MemoryError: the GPU has no room for the buffers of a new shape.
        """
        inputs.validate(self.config)
        noise = as_tensor(noise)
        self._check_start(noise, continuation, inputs.batch, num_steps)
        per_token = isinstance(continuation, FixedPrefix)
        plan = self._plan_of(inputs, noise.shape[1], noise.shape[2], num_steps, per_token)
        return self._run("infer", self.session(plan), plan, inputs, noise, continuation)

    def observe(
        self,
        inputs: ModelInputs,
        *,
        samples: int = 1,
        horizon: int | None = None,
        num_steps: int | None = None,
        per_token_time: bool = False,
    ) -> dict[str, float]:
        """The first half of ``infer``: cameras and prompt to keys and values. ``sample`` draws chunks from them.

        For running the halves at different times: look once, draw several times, or look while a chunk is executed.

        Args:
            inputs: a batch of B observations.
            samples, horizon, num_steps: of the chunks that will be drawn.
            per_token_time: whether some of them will have a :class:`FixedPrefix` (π0.5 only).

        Returns:
            Wall time of each part in seconds.

        Raises:
            ValueError: inputs that the model cannot take.
        """
        inputs.validate(self.config)
        plan = self._plan_of(inputs, samples, horizon, num_steps, per_token_time)
        return self._run("observe", self.session(plan), plan, inputs, None).seconds

    def sample(self, noise: NDArray[np.float32] | Tensor, *, continuation: Continuation | None = None) -> Inference:
        """The second half of ``infer``: chunks for what was observed last, as often as wanted.

        Args:
            noise: float32 [B, samples, H, action_dim], of the sizes that ``observe`` was told.
            continuation: as in :meth:`infer`, for these chunks only.

        Raises:
            ValueError: nothing was observed since the last ``infer``, noise or a continuation of another shape, or one
                that ``observe`` was not told of.
        """
        if self._observed is None:
            raise ValueError("there is no observation to sample from: call observe first (infer forgets it)")
        session, num_steps = self._observed
        plan, noise = session.plan, as_tensor(noise)
        self._check_start(noise, continuation, plan.batch, num_steps)
        if noise.shape[1:3] != (plan.samples, plan.horizon):
            raise ValueError(
                f"noise is {list(noise.shape)}, observed for {plan.samples} samples of horizon {plan.horizon}"
            )
        if isinstance(continuation, FixedPrefix) and not plan.per_token_time:
            raise ValueError(
                "the continuation gives a prefix, but observe was not told so: observe(per_token_time=True)"
            )
        plan = dataclasses.replace(plan, num_steps=num_steps)
        return self._run("sample", session, plan, None, noise, continuation)

    @property
    def resizes_on_gpu(self) -> bool:
        """Whether frames are resized by our kernel, inside the graph, and not on the way there."""
        return any(choice.op == "frames_to_patches" and choice.implementation == "cuda" for choice in self.ops.choices)

    def warm_up(
        self,
        *,
        views: int,
        samples: int = 1,
        horizon: int | None = None,
        per_token_time: bool = False,
        progress: bool = False,
    ) -> None:
        """Make the buffers, and on a GPU the graphs, of one observation with ``views`` cameras and any prompt.

        Without it the first inference of each shape does so. At most ``max_plans`` shapes are made, the shortest
        prompts first; others follow when they are needed. ``per_token_time`` makes them for a :class:`FixedPrefix`.

        Raises:
            ValueError: a number of views that is not 1 to 4, or a time per token of a model that has none.
            MemoryError: the GPU has no room.
        """
        if not 1 <= views <= 4:
            raise ValueError(f"views is {views}, expected 1 to 4")
        lengths = range(1, self.config.token_capacity + 1)
        frames = (1, 1) if self.resizes_on_gpu else None  # the least bucket
        plans = list(
            dict.fromkeys(
                self.plan(
                    views=[views],
                    prompt_lengths=[n],
                    samples=samples,
                    horizon=horizon,
                    frames=frames,
                    per_token_time=per_token_time,
                )
                for n in lengths
            )
        )
        plans = plans[: self.engine_config.max_plans] if self.device.type == "cuda" else plans[:1]
        for plan in tqdm(plans, "warming up", disable=not progress, leave=False):
            if self.use_graph:
                self.graph(plan)
            else:
                self.session(plan)

    def plan(
        self,
        *,
        views: list[int],
        prompt_lengths: list[int],
        samples: int = 1,
        horizon: int | None = None,
        num_steps: int | None = None,
        frames: tuple[int, int] | None = None,
        per_token_time: bool = False,
    ) -> ShapePlan:
        """The lengths with which this engine serves such observations; arguments as of :meth:`ShapePlan.of`."""
        bucket = self.engine_config.prompt_bucket or (GPU_PROMPT_BUCKET if self.device.type == "cuda" else 1)
        return ShapePlan.of(
            self.config,
            views=views,
            prompt_lengths=prompt_lengths,
            samples=samples,
            horizon=horizon,
            num_steps=num_steps,
            prompt_bucket=bucket,
            frames=frames,
            per_token_time=per_token_time,
            solver=self.engine_config.solver,
        )

    def describe(self) -> dict[str, Any]:
        """What decides what this engine computes and how it rounds, as JSON values."""
        machine = describe_machine(self.device)
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            **{
                name: getattr(self.engine_config, name) for name in ("backend", "attention", "launch_configs", "solver")
            },
            "machine": {name: machine[name] for name in ("device", "threads", "torch", "unsafe") if name in machine},
        }

    def session(self, plan: ShapePlan) -> Session:
        """The buffers of a plan; made at its first use, the least recently used set is freed for it."""
        if plan not in self._sessions:
            while len(self._sessions) >= self.engine_config.max_plans:
                freed, _ = self._sessions.popitem(last=False)
                log.debug("freed %s", freed)
            with reporting_memory(self.device, f"the buffers of {plan}"):
                self._sessions[plan] = Session(self.config, plan, self.dtype, self.device, self.scratch, self._resize)
            megabytes = self._sessions[plan].space.arena.numel() / 1e6
            log.debug("new plan %s: %.1f MB of buffers", plan, megabytes)
        self._sessions.move_to_end(plan)
        return self._sessions[plan]

    def graph(self, plan: ShapePlan, part: str = "infer") -> CapturedGraph:
        """The CUDA graph that runs ``part`` ("infer", "observe" or "sample") of a plan, captured at its first use.

        Raises:
            ValueError: this engine runs without graphs.
        """
        if not self.use_graph:
            raise ValueError(f"this engine runs without CUDA graphs: device {self.device}, {self.engine_config}")
        return self._graph(self.session(plan), plan, part)

    def _graph(self, session: Session, plan: ShapePlan, part: str) -> CapturedGraph:
        key = part, plan.num_steps
        if key not in session.graphs:
            # The terms are kept with the graph: its kernels read them, whoever asks for other step counts meanwhile.
            steps = self._steps(plan)
            with (
                torch.inference_mode(),
                torch.cuda.device(self.device),
                reporting_memory(self.device, f"a CUDA graph of {plan}"),
            ):
                session.graphs[key] = CapturedGraph(lambda: self._issue(part, session, plan, _no_lap), [steps])
            log.debug("captured the graph %r of %s", part, plan)
        return session.graphs[key]

    def _run(
        self,
        part: str,
        session: Session,
        plan: ShapePlan,
        inputs: ModelInputs | None,
        noise: Tensor | None,
        continuation: Continuation | None = None,
    ) -> Inference:
        """Load what is given, run the part, fetch the actions if there are any."""
        # Before the clock starts, so that a new shape is not timed as a stage.
        self._steps(plan)
        graph = self._graph(session, plan, part) if self.use_graph else None
        clock = StageClock(self.device)
        self._observed = None
        with torch.inference_mode(), _current(self.device):
            if inputs is not None:
                session.load_observation(inputs, self._embed)
            if noise is not None:
                session.load_noise(noise, continuation)
            clock.lap("inputs", wait=graph is None)
            if graph is None:
                self._issue(part, session, plan, clock.lap)
            else:
                graph.replay()
                clock.lap("replay")
        if part != "infer":
            self._observed = session, plan.num_steps
        if noise is None:
            return Inference(torch.empty(0), clock.seconds)
        with _current(self.device):
            actions = session.actions()
        if not bool(torch.isfinite(actions).all()):
            raise NotFiniteError("the model computed NaN or infinity from finite inputs: are the weights finite?")
        return Inference(actions, clock.seconds)

    def _issue(self, part: str, session: Session, plan: ShapePlan, lap: Callable[[str], None]) -> None:
        """Call the ops of "infer" or of one of its halves."""
        steps = self._steps(plan)
        if part != "sample":
            pipeline.observe(self.ops, self.config, self.weights, session.space, lap)
        if part != "observe":
            pipeline.sample(self.ops, self.config, self.weights, steps, session.space, lap)

    def _steps(self, plan: ShapePlan) -> tuple[StepTerms, ...]:
        return self.time_terms(plan.num_steps, per_token=plan.per_token_time)

    def _plan_of(
        self,
        inputs: ModelInputs,
        samples: int,
        horizon: int | None,
        num_steps: int | None,
        per_token_time: bool,
    ) -> ShapePlan:
        return self.plan(
            views=inputs.image_masks.sum(axis=1).tolist(),
            prompt_lengths=inputs.token_mask.sum(axis=1).tolist(),
            samples=samples,
            horizon=horizon,
            num_steps=num_steps,
            frames=self._frame_room(inputs),
            per_token_time=per_token_time,
        )

    def _frame_room(self, inputs: ModelInputs) -> tuple[int, int] | None:
        """Bytes and table entries that the frames take at most, where a GPU resizes them."""
        if not inputs.frames or not self.resizes_on_gpu:
            return None
        sides = [(frame.shape[0], frame.shape[1]) for row in inputs.frames for frame in row]
        return staging_size(sides, self.config.vision.image_size) if sides else None

    def _embed(self, tokens: Tensor) -> Tensor:
        """Rows of the memory-mapped table times sqrt(width), as Gemma scales text (and only text) embeddings."""
        return self.weights.embed_tokens[tokens].float() * math.sqrt(self.config.llm.width)

    def _check_start(self, noise: Tensor, continuation: Continuation | None, batch: int, num_steps: int | None) -> None:
        expected = f"float32 [{batch}, samples, horizon, {self.config.action_dim}]"
        fits = noise.ndim == 4 and noise.shape[0] == batch and noise.shape[3] == self.config.action_dim
        if not fits or noise.dtype != torch.float32 or noise.numel() == 0:
            raise ValueError(f"noise is {noise.dtype} {list(noise.shape)}, expected {expected}")
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("noise contains NaN or infinity")
        if isinstance(continuation, Guide):
            check_guidable(self.engine_config.solver)
        if continuation is not None:
            num_steps = self.config.num_steps if num_steps is None else num_steps
            continuation.validate(self.config, batch, noise.shape[2], num_steps)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _no_lap(stage: str) -> None:
    """A capture has no time of its own."""
