"""AdamW by parameter name, so that its moments survive growth and resumption; the learning rate by step."""

from typing import Any

import torch
from torch import Tensor, nn

from train.config import StudentConfig
from train.growth import Stage, grow_mapping

ParameterState = dict[str, Tensor]  # of one parameter: step, exp_avg, exp_avg_sq
OptimiserState = dict[str, ParameterState]
STACK = "student.encoder.layers."


def make_optimiser(config: StudentConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, one group."""
    settings = config.optimiser
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(config: StudentConfig, stage: Stage, step: int) -> float:
    """Warm-up over a share of the steps, then linear decay to zero; over all stages, or over each anew."""
    first, num_steps = 0, config.steps
    if config.growth.learning_rate == "restart":
        first, num_steps = stage.first_step, stage.num_steps
    local = step - first
    warmup = max(1, round(config.optimiser.warmup * num_steps))
    factor = (local + 1) / warmup if local < warmup else (num_steps - local) / (num_steps - warmup + 1)
    if stage.sources is not None and config.growth.optimiser == "fresh":
        factor *= min(1.0, (step - stage.first_step + 1) / max(1, config.growth.fresh_warmup_steps))
    return config.optimiser.lr * factor


def read_state(optimiser: torch.optim.Optimizer, model: nn.Module) -> OptimiserState:
    """The optimiser's state by parameter name. Tensors are the optimiser's own, not copies."""
    return {
        name: dict(optimiser.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimiser.state
    }


def write_state(optimiser: torch.optim.Optimizer, model: nn.Module, state: OptimiserState) -> None:
    """Give the optimiser copies of a state by parameter name. Strict: the state names trainable parameters only."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    assert all(parameters[name].requires_grad for name in state)
    for name, values in state.items():
        optimiser.state[parameters[name]] = {key: value.clone() for key, value in values.items()}


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the exponential moving average of all weights, in place: a <- decay · a + (1 - decay) · w."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def grown_state(state: OptimiserState, stage: Stage, method: str) -> OptimiserState:
    """The optimiser's state after growth, by `growth.optimiser`.

    "copy": clones get their original's moments and step; "copy-reset-step": the same, and every step counts from 0
    again; "fresh": nothing is kept.
    """
    if method == "fresh":
        return {}
    assert stage.sources is not None
    grown = grow_mapping(state, stage.sources, prefix=STACK)
    if method == "copy-reset-step":
        grown = {name: values | {"step": torch.zeros_like(values["step"])} for name, values in grown.items()}
    return grown
