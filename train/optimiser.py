"""AdamW with its state by parameter name, so that moments survive growth and resumption; the learning rate by step."""

import torch
from torch import Tensor, nn

from train.config import GrowthConfig, StudentConfig
from train.growth import Stage, drop_changed, grow_mapping

ParameterState = dict[str, Tensor]  # of one parameter: step, exp_avg, exp_avg_sq
OptimiserState = dict[str, ParameterState]  # by parameter name
STACK = "student.encoder.layers."  # name prefix of the blocks that growth copies


def make_optimiser(config: StudentConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over all trainable parameters, in one group (Loshchilov & Hutter, arXiv 1711.05101)."""
    settings = config.optimiser
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # one kernel for all parameters
    )


def make_scaler(config: StudentConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of the loss for precision fp16, for others one without effect.

    Small gradients would be zero in fp16. A step whose gradients overflow is left out and halves the scale; 2000 good
    steps in a row double it.
    """
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")


def learning_rate(config: StudentConfig, stage: Stage, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then linear decay to zero.

    n and t of `warmup_decay` count over all stages, or within the stage with `learning_rate: restart`. `rewarm` is the
    first with a linear warm-up after each growth, over the share `warmup` of the stage.
    """
    first, num_steps = 0, config.steps
    if config.growth.learning_rate == "restart":
        first, num_steps = stage.first_step, stage.num_steps
    local = step - first
    factor = warmup_decay(local, num_steps, config.optimiser.warmup)
    if stage.sources is not None and config.growth.learning_rate == "rewarm":
        factor *= min(1.0, (step - stage.first_step + 1) / max(1, round(config.optimiser.warmup * stage.num_steps)))
    if stage.sources is not None and config.growth.optimiser == "fresh":
        # Moments of zero make AdamW's first steps large: ramp up anew after growth.
        factor *= min(1.0, (step - stage.first_step + 1) / max(1, config.growth.fresh_warmup_steps))
    return config.optimiser.lr * factor


def warmup_decay(step: int, num_steps: int, warmup: float) -> float:
    """Return the factor of the peak learning rate: with n steps, w = warmup · n of them warm-up, and t the step from 0,
    (t + 1) / w  for t < w,  (n - t) / (n - w + 1)  after."""
    warmup_steps = max(1, round(warmup * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / (num_steps - warmup_steps + 1)


def read_state(optimiser: torch.optim.Optimizer, model: nn.Module) -> OptimiserState:
    """Return the optimiser's state by parameter name. Tensors are the optimiser's own, not copies."""
    return {
        name: dict(optimiser.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimiser.state
    }


def write_state(optimiser: torch.optim.Optimizer, model: nn.Module, state: OptimiserState) -> None:
    """Set the optimiser's state to copies of `state`, whose names must be those of trainable parameters.

    The copies are on the devices of their parameters: a checkpoint is read on the CPU, and AdamW's fused kernel takes
    moments and step count on the parameter's device alone.
    """
    parameters = dict(model.named_parameters())
    assert all(parameters[name].requires_grad for name in state)
    for name, values in state.items():
        parameter = parameters[name]
        # Always a copy: after growth, a clone's moments come as its original's own tensors.
        optimiser.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in values.items()}


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Update the exponential moving average of all weights, in place: a <- decay · a + (1 - decay) · w."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def grown_state(state: OptimiserState, stage: Stage, growth: GrowthConfig) -> OptimiserState:
    """Return the optimiser's state after growth, by `growth.optimiser`.

    "copy": clones get their original's moments and step count. "copy-reset-step": the same, but every step count is 0,
    which restarts AdamW's bias correction. "fresh": no state. Parameters that `growth.clones` sets have none, moments
    and step count 0: past gradients are those of other values.
    """
    if growth.optimiser == "fresh":
        return {}
    assert stage.sources is not None
    grown = grow_mapping(state, stage.sources, prefix=STACK)
    if growth.clones == "identity":
        drop_changed(grown, stage.sources, prefix=STACK)
    if growth.optimiser == "copy-reset-step":
        grown = {name: values | {"step": torch.zeros_like(values["step"])} for name, values in grown.items()}
    return grown
