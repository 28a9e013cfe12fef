"""What a policy server is told when it starts: the options of ``pi0-engine serve``, and what they make."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from pi0_engine.config import BackendName, DtypeName, EngineConfig, SolverName
from pi0_engine.model_options import ModelOptions
from pi0_engine.policy import Pi0Policy
from pi0_engine.recording.recorder import Recorder, describe_policy
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.files import get_robot
from pi0_engine.rtc.schedule import Mode, RtcConfig, Schedule
from pi0_engine.serving.access import Keys
from pi0_engine.serving.fleet import FleetOptions, ReplicaOptions
from pi0_engine.serving.server import ServerOptions
from pi0_engine.serving.service import Service, ServiceOptions
from pi0_engine.torch_needed import require_torch


@dataclass(frozen=True)
class ServeOptions:
    """A policy, its server or its fleet, as the command line and Ray's configuration files say it."""

    robot: str
    """'aloha', 'droid', 'libero', ..., or a declaration file (docs/robots.md)."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine (0.0.0.0, ::) only with --api-key-file."""
    port: int = 8000
    """0 takes a free one."""
    api_key_file: str | None = None
    """Keys that clients must send, one per line: openpi's `Authorization: Api-Key KEY`."""
    allow_unauthenticated: bool = False
    """Listen beyond this machine without keys."""
    tls_cert: str | None = None
    """PEM certificate: serve wss:// instead of ws://. Needs --tls-key."""
    tls_key: str | None = None
    device: str = "cpu"
    dtype: DtypeName = "auto"
    backend: BackendName = "auto"
    allow_unsafe_triton: bool = False
    """Serve on sm_90 and newer with a Triton before 3.7.1, whose kernels may compute wrong numbers there."""
    launch_configs: str | None = None
    """Launch configurations that `pi0-engine tune` wrote, instead of those shipped."""
    solver: SolverName = "euler"
    """Of the flow: 'midpoint' calls the network twice per flow step, the others once. Only 'euler' continues chunks in
    guided mode (docs/solvers.md)."""
    tokenizer: str | None = None
    """Sentencepiece .model or tokenizer.json; looked for beside the checkpoint and in caches where not given."""
    norm_stats: str | None = None
    """Statistics file or directory; looked for in the checkpoint where not given."""
    asset_id: str | None = None
    """Which statistics, where the checkpoint has several."""
    rtc_mode: Mode = "guided"
    """How a chunk continues the one in execution, for clients that ask for it: 'guided' with any checkpoint, 'trained'
    for π0.5 checkpoints that were trained so (docs/rtc.md)."""
    rtc_schedule: Schedule = "linear"
    """How the pull towards the old chunk fades between delay and execution horizon. Guided."""
    rtc_execution_horizon: int = 10
    """Actions of the new chunk that are pulled at all. Guided."""
    rtc_max_guidance_weight: float = 10.0
    """Bound of the pull in the first flow steps. Guided."""
    seed: int | None = None
    """Of the noise: the n-th session always draws the same. Not given: from the operating system."""
    metadata: str | None = None
    """JSON file of what clients are told before everything else, e.g. {"reset_pose": [...]}."""
    max_sessions: int = 32
    """Connections at a time."""
    max_waiting: int = 8
    """Sessions that may wait for the engine; a further one is told at once that the queue is full."""
    max_message_mb: float = 16.0
    """Largest message, in 10^6 bytes."""
    drain_s: float = 10.0
    """After SIGTERM, how long answers under way may take; past it they are dropped."""
    record: str | None = None
    """Write observations and answers into this directory (docs/recording.md)."""
    record_gb: float = 10.0
    """Of them, keep the newest so many 10^9 bytes."""
    verbose: bool = False
    """Also log every refused message."""
    ray: bool = False
    """Serve a fleet with Ray Serve: one engine per replica behind this one address (docs/fleet.md)."""
    fleet: Annotated[FleetOptions, tyro.conf.arg(name="")] = field(default_factory=FleetOptions)

    def server(self) -> ServerOptions:
        """Where it listens, and to whom."""
        return ServerOptions(
            host=self.host,
            port=self.port,
            keys=self._keys(),
            allow_unauthenticated=self.allow_unauthenticated,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            max_message_mb=self.max_message_mb,
            drain_s=self.drain_s,
        )

    def service(self) -> Service:
        """The policy and its sessions, in this process. Raises ValueError for options of a fleet."""
        if self.fleet != FleetOptions():
            raise ValueError("--replicas, --autoscale and --cpus-per-replica are options of a fleet: give --ray too")
        load = partial(self._load, get_robot(self.robot), self._rtc())
        service = Service(load, self._sessions(), record=None if self.record is None else self._recorder)
        self._check()
        return service

    def replica(self) -> ReplicaOptions:
        """What each replica of a fleet is made of. Raises ValueError for what cannot be one."""
        if self.record is not None:
            raise ValueError("--record is given with --ray, where nothing is recorded yet")
        self._check()
        if self.model.checkpoint is None:
            self.model.open()  # raises here what would end every replica; a checkpoint may be on their machines only
        return ReplicaOptions(
            load=partial(self._load, get_robot(self.robot), self._rtc()),
            service=self._sessions(),
            keys=self._keys(),
            max_message_mb=self.max_message_mb,
            drain_s=self.drain_s,
            device=self.device,
            verbose=self.verbose,
        )

    def _check(self) -> None:
        """What would otherwise be said by the thread, or the replicas, that load the policy."""
        self.model.check()
        require_torch("a policy server")

    def _keys(self) -> Keys:
        return Keys() if self.api_key_file is None else Keys.read(self.api_key_file)

    def _sessions(self) -> ServiceOptions:
        return ServiceOptions(self.max_sessions, self.max_waiting, self.seed, _metadata(self.metadata))

    def _rtc(self) -> RtcConfig:
        return RtcConfig(self.rtc_mode, self.rtc_schedule, self.rtc_execution_horizon, self.rtc_max_guidance_weight)

    def _load(self, robot: Robot, rtc: RtcConfig) -> Pi0Policy:
        return self.model.policy(
            robot,
            EngineConfig(
                device=self.device,
                dtype=self.dtype,
                backend=self.backend,
                launch_configs=self.launch_configs,
                solver=self.solver,
            ),
            tokenizer=self.tokenizer,
            norm_stats=self.norm_stats,
            asset_id=self.asset_id,
            rtc=rtc,
            allow_unsafe_triton=self.allow_unsafe_triton,
            progress=sys.stderr.isatty(),
        )

    def _recorder(self, policy: Pi0Policy) -> Recorder:
        assert self.record is not None
        sources = {**vars(self.model), "tokenizer": self.tokenizer, "norm_stats": self.norm_stats}
        metadata = describe_policy(policy, **sources, asset_id=self.asset_id, seed=self.seed)
        return Recorder(self.record, metadata, max_bytes=int(self.record_gb * 1e9))


def _metadata(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the metadata: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, expected an object with names and values")
    return data
