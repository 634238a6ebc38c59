"""A model and its optimiser made ready for training as a run says; measuring its memory needs both as training does."""

from __future__ import annotations

from accelerate import Accelerator
from torch.optim import Optimizer
from transformers import PreTrainedModel

from manyvoice.config import ElasticConfig, RunConfig
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.sampling import Alone, Sandwich
from manyvoice.elastic.sizes import Grid, nested_sizes
from manyvoice.models import batchnorm
from manyvoice.train.flatstart import flat_ctc
from manyvoice.train.objective import Passes, ctc, one_pass
from manyvoice.train.optim import build_optimizer
from manyvoice.train.sandwich import Sampler, SupernetPasses

# Peak rates that small Parakeets learned with; `bench supernet` has 8e-4 and 0.03 in batches of 30 seconds, and these
# stay below, for smaller ones. icefall's Zipformer recipe has 0.045 for ScaledAdam, in far larger batches.
_LR = {"adamw": 4e-4, "scaledadam": 0.02}
_DECAY = {"adamw": 0.01, "scaledadam": 0.0}
_BETAS = (0.9, 0.98)


def ready(model: PreTrainedModel, config: RunConfig, accelerator: Accelerator) -> bool:
    """Put a model where, and as precisely as, it trains; returns whether BatchNorm's statistics rest."""
    if config.train.precision == "fp64":
        model.double()
    model.to(accelerator.device)
    if config.train.activation_checkpointing:
        # the reentrant kind would compute wrong gradients silently where the model is narrowed
        model.activation_checkpointing_enable({"use_reentrant": False})
    # written rule: statistics learn with a model from nothing and rest in fine-tuning
    freeze = config.model.freeze_batchnorm
    tuned = config.model.base is not None and not config.model.new_vocabulary
    frozen = tuned if freeze is None else freeze
    batchnorm.freeze(model, frozen)
    return frozen


def passes_of(model: PreTrainedModel, config: RunConfig, steps: int = 0) -> Passes:
    """What a step minimises: CTC, or a supernet's sandwich of it.

    Args: steps: of the whole run; 0 for steps in which every subnet has its turn.
    """
    if config.elastic is None:
        return one_pass(flat_ctc if config.train.flat_start else ctc)
    return supernet_passes(model, config.elastic, config, steps)


def check_sizes(model: PreTrainedModel, config: RunConfig) -> None:
    """UsageError if the run asks for sizes that the model cannot have; asked before features are computed."""
    if config.elastic is not None:
        nested_sizes(Grid(model, Elastic(model).family), config.elastic.sizes)


def supernet_passes(
    model: PreTrainedModel, settings: ElasticConfig, config: RunConfig, steps: int = 0
) -> SupernetPasses:
    """A supernet's sizes, sampling and distillation as a run says. UsageError if its sizes cannot be."""
    for module in model.modules():
        if getattr(module, "layerdrop", 0):
            # Transformers' name for it: a teacher of random depth, and sizes of fewer layers than they have
            setattr(module, "layerdrop", 0.0)  # noqa: B010 - typed as a tensor or a module
    elastic, seed = Elastic(model), config.seed
    grid = Grid(model, elastic.family)
    sizes = nested_sizes(grid, settings.sizes)
    sampler: Sampler = Alone(sizes, seed=seed)
    if settings.sandwich:
        between = grid if settings.named < 1 else None
        sampler = Sandwich(
            sizes, seed=seed, others=settings.others, grid=between, named=settings.named,
            alone=max(0, min(round(config.grow * steps), steps - 1)),
        )  # fmt: skip
    return SupernetPasses(
        elastic,
        sampler,
        distill=settings.distill,
        hard=settings.hard,
        weight=settings.weight,
        dropout=settings.dropout,
        flat_start=config.train.flat_start,
    )


def learning_rate(config: RunConfig) -> float:
    """The peak, where the run does not say by the optimiser."""
    return _LR[config.optimizer_name] if config.optimizer.lr is None else config.optimizer.lr


def weight_decay(config: RunConfig) -> float:
    """Where the run does not say by the optimiser."""
    said = config.optimizer.weight_decay
    return _DECAY[config.optimizer_name] if said is None else said


def what_null_means(config: RunConfig) -> str:
    """Comments for a run file: the settings that it leaves to the model and the optimiser, and what they are."""
    known = {
        "optimizer.name": (config.optimizer.name, config.optimizer_name),
        "optimizer.lr": (config.optimizer.lr, learning_rate(config)),
        "optimizer.weight_decay": (config.optimizer.weight_decay, weight_decay(config)),
    }
    if config.elastic is not None:
        known["elastic.grow"] = config.elastic.grow, config.grow
    return "".join(f"# {name}: null is {used} here\n" for name, (said, used) in known.items() if said is None)


def make_optimizer(model: PreTrainedModel, config: RunConfig) -> Optimizer:
    """The run's optimiser over all the model's parameters."""
    return build_optimizer(
        model.named_parameters(), config.optimizer_name, lr=learning_rate(config), weight_decay=weight_decay(config),
        betas=_BETAS, eps=1e-8,
    )  # fmt: skip
