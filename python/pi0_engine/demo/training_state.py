"""Parameters, their running average and AdamW's moments: what one step changes, and a file to go on from."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi0_engine.reference.model import Pi0Reference

#: AdamW, as openpi trains π0: moments, decay, and the largest norm of a step's gradient.
_BETAS, _DECAY, _MOST_NORM = (0.9, 0.95), 1e-2, 1.0


class TrainingState:
    """One run. Build it with :meth:`resume`.

    Attributes:
        step: steps done.
    """

    def __init__(self, path: Path, model: Pi0Reference, recipe: Any) -> None:
        self.path, self.model, self.step = path, model, 0
        self._recipe = json.dumps(asdict(recipe), sort_keys=True)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=_BETAS, weight_decay=_DECAY, fused=True)
        self._average = {name: value.detach().clone() for name, value in model.named_parameters()}

    @classmethod
    def resume(cls, path: Path, model: Pi0Reference, recipe: Any) -> TrainingState:
        """Where the run in ``path`` was saved, or the beginning where there is none.

        Raises:
            ValueError: the run was begun with another recipe.
        """
        state = cls(path, model, recipe)
        if not path.is_file():
            return state
        with safe_open(path, framework="pt") as file:
            saved = file.metadata()
            if saved["recipe"] != state._recipe:
                raise ValueError(f"{path} was trained with {saved['recipe']}, expected {state._recipe}")
            state.step = int(saved["step"])
            for name, parameter in model.named_parameters():
                device = parameter.device
                parameter.data.copy_(file.get_tensor(f"parameter.{name}"))
                state._average[name].copy_(file.get_tensor(f"average.{name}"))
                if f"first.{name}" in file.keys():  # noqa: SIM118  (not a dict)
                    state._optimizer.state[parameter] = {
                        "step": torch.tensor(float(state.step), device=device),  # where fused AdamW keeps it
                        "exp_avg": file.get_tensor(f"first.{name}").to(device),
                        "exp_avg_sq": file.get_tensor(f"second.{name}").to(device),
                    }
        return state

    def update(self, rate: float, average: float) -> None:
        """One step along the gradients, which are cleared. ``average`` is the past's weight in the running mean."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MOST_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        # In the first steps the mean is of fewer.
        weight = min(average, 1 - 1 / (self.step + 1))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self._average[name].lerp_(parameter, 1 - weight)

    def averaged(self) -> Pi0Reference:
        """A copy of the model with the averaged parameters, on the CPU."""
        model = copy.deepcopy(self.model).cpu()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self._average[name])
        return model.eval()

    def save(self) -> None:
        """Write the file whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"parameter.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self._average[name]
            # Of the last prefix layer only keys and values are used: the rest of it has no gradient and no moments.
            if moments := self._optimizer.state.get(parameter):
                tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"recipe": self._recipe, "step": str(self.step)})
        partial.replace(self.path)
