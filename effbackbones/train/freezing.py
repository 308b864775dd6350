"""What of a model is not trained."""

from typing import Any

from torch import nn


def freeze_stages(model: Any, count: int) -> None:
    """Take the gradient from the stem and the first `count` stages of a backbone of the zoo; -1 takes none."""
    for module in [] if count < 0 else [model.stem, *model.stages[:count]]:
        module.requires_grad_(False)


def classifier_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a timm model that depend on the number of classes."""
    names = model.pretrained_cfg["classifier"]
    return [model.get_submodule(name) for name in ([names] if isinstance(names, str) else names)]


def rest_frozen(model: nn.Module) -> None:
    """Put every module into evaluation mode that has parameters, none of which is trained.

    To be called whenever `model.train()` was: dropout, stochastic depth and batch norms in there do nothing then that
    depends on chance or on the batch.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def rest_batch_norms(model: nn.Module) -> None:
    """Put the batch norms of a model into evaluation mode, which keeps their statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
