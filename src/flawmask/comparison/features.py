"""The network of the baselines: EfficientNet-Lite0's body, as in the default detector on a CPU."""

from torch import Tensor, nn

from flawmask.comparison.entry import MissingRequirementError
from flawmask.errors import FlawmaskError, OutOfReachError
from flawmask.model.efficientnet_lite import DEVIATION, MEAN, SIZES, body
from flawmask.model.layers import replace_norms
from flawmask.model.spec import Norm
from flawmask.model.weights import pretrained

DETECTOR, PREFIX = "maskrcnn_efficientnet_lite0_fpn", "backbone.body."
"""The detector with the same body, and the start of the body's names in it."""

CHANNELS = 320
"""The channels of the body's output."""


def pretrained_body(weights: str, *, offline: bool = False) -> tuple[nn.Sequential, Norm]:
    """Return the body with the weights that `--weights` names, and the kind of its norms: frozen, if it is pretrained.

    Args:
        weights: `auto`, `coco` and `imagenet` mean the ImageNet weights that pip brings. `none` means random weights.
            All else is a file with the weights of the body, or of a detector with it.
        offline: download nothing.

    Raises:
        MissingRequirementError: `auto` was given, and the package with the weights is not installed.
        FlawmaskError: the weights cannot be loaded, or belong to another network.
    """
    try:
        found = pretrained(DETECTOR, weights, offline=offline)
    except OutOfReachError as error:
        if weights == "auto":  # the user asked for no particular weights: the baseline is left out
            raise MissingRequirementError(str(error)) from None
        raise
    network = empty_body(found.norm)
    if weights != "none":
        state = {name.removeprefix(PREFIX): tensor for name, tensor in found.state.items() if name.startswith(PREFIX)}
        wanted = {
            name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")
        }
        wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
        if wrong:
            raise FlawmaskError(
                f"{weights} is no state dict of EfficientNet-Lite0: {wrong[0]} is missing or has another shape"
            )
        network.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return network, found.norm


def empty_body(norm: Norm) -> nn.Sequential:
    """Return the body with random weights and norms of this kind."""
    network = body(SIZES["lite0"])
    replace_norms(network, norm, None)
    return network


def normalised(pixels: Tensor) -> Tensor:
    """Return (B, 3, H, W) uint8 images as float32, normalised as the body needs them."""
    return (pixels.float() / 255 - MEAN) / DEVIATION
