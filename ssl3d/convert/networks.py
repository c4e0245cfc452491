"""2D networks by name, and where their ImageNet weights are."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from torch import nn

from ssl3d.convert.network import Tracer
from ssl3d.errors import UsageError

TIMM = "timm/"
LITE = "efficientnet_lite0"


@dataclass(frozen=True)
class Source:
    """Place of the weights of a network.

    Attributes:
        url: URL to fetch the weights from.
        file: File name there, and in torch's folder of checkpoints.
        hub: Repository on the Hugging Face hub, instead of a URL.
    """

    url: str = ""
    file: str = ""
    hub: str = ""


def network_2d(name: str) -> nn.Module:
    """Build the untrained 2D network of a name, for RGB images.

    Args:
        name: Name of a classifier of torchvision (`resnet18`) or timm (`timm/resnet18d`), or
            `efficientnet_lite0`.

    Raises:
        UsageError: There is no such network, or it needs timm, which is missing.
    """
    if name == LITE:
        from ssl3d.convert.lite import EfficientNetLite0

        return EfficientNetLite0()
    if name.startswith(TIMM):
        timm_network: nn.Module = _timm(name).create_model(name.removeprefix(TIMM), pretrained=False)
        return timm_network
    from torchvision import models

    _check_torchvision(name)
    # Without aux_logits=False, inception's and googlenet's builders would say what will change in them.
    quick = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = models.get_model(name, weights=None, **quick)
    return network


def source_of(name: str, version: str | None = None) -> Source | None:
    """Find the ImageNet weights of a network; None if nobody gives them by name.

    Args:
        name: Name of the network.
        version: Name that torchvision gives one of several, such as IMAGENET1K_V2; the first by default,
            which all published comparisons use.

    Raises:
        UsageError: There are no weights of that version.
    """
    if name == LITE:
        return None
    if name.startswith(TIMM):
        given = _timm(name).get_pretrained_cfg(name.removeprefix(TIMM))
        url, hub = str(getattr(given, "url", "") or ""), str(getattr(given, "hf_hub_id", "") or "")
        return Source(url, url.rpartition("/")[2], hub) if url or hub else None
    from torchvision import models

    _check_torchvision(name)
    members = list(models.get_model_weights(name))
    if not members:
        return None
    chosen = members[0]
    if version is not None:
        named = {member.name: member for member in members}
        if version not in named:
            raise UsageError(f"{name}: weights {version!r} are no file, nor one of {', '.join(named)}")
        chosen = named[version]
    return Source(chosen.url, chosen.url.rpartition("/")[2])


def stems_of(net: nn.Module) -> list[nn.Conv2d]:
    """Find the convolutions that read the image: one, or several side by side.

    Raises:
        UsageError: The image goes elsewhere first, or not as three channels.
    """
    graph = Tracer().trace(net)
    ahead = [node for node in graph.nodes if node.op == "placeholder"][:1]
    stems: dict[str, nn.Conv2d] = {}
    seen = set(ahead)
    while ahead:
        for user in ahead.pop().users:
            module = net.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                stems[str(user.target)] = module
            elif user not in seen:
                seen.add(user)
                ahead.append(user)
    wrong = [name for name, conv in stems.items() if conv.in_channels != 3 or conv.groups != 1]
    if wrong or not stems:
        detail = f": {wrong[0]} reads {stems[wrong[0]].in_channels} channels" if wrong else ""
        raise UsageError(f"{type(net).__name__} does not begin with a convolution of RGB images{detail}")
    return list(stems.values())


def replace_stem(net: nn.Module, channels: int) -> None:
    """Make a network read as many channels as given: its RGB kernels are summed and shared out.

    A picture, the same in all channels, gives what it gave the 2D network; three channels change nothing.

    Args:
        net: Network with a stem that reads three channels; changed in place.
        channels: Number of channels to read.
    """
    for stem in stems_of(net) if channels != 3 else ():
        weight = stem.weight.detach().sum(1, keepdim=True) / channels
        stem.weight = nn.Parameter(weight.expand(-1, channels, -1, -1).contiguous())
        stem.in_channels = channels


def tripled_stem(net: nn.Module, groups: int) -> None:
    """Make a network read each of several channels as an RGB image, by its kernels over their number."""
    for stem in stems_of(net) if groups > 1 else ():
        stem.weight = nn.Parameter(stem.weight.detach().repeat(1, groups, 1, 1) / groups)
        stem.in_channels = 3 * groups


def keep_the_signal(net: nn.Module) -> None:
    """Give untrained grouped kernels the variance that keeps the signal's.

    torchvision's MobileNets and EfficientNets begin with depth-wise kernels that are smaller by the root of
    the number of channels (torch counts the outputs of all groups): untrained, with the norms' statistics
    of the beginning, nothing of the volume would be left in the deepest map (5e-11 of its variation).

    Args:
        net: Untrained network; kernels of that variance are changed in place.
    """
    for module in net.modules():
        if not isinstance(module, nn.Conv2d) or module.groups == 1:
            continue
        seen = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        if abs(float(module.weight.detach().std()) / (2 / seen) ** 0.5 - 1) < 0.25:
            module.weight.data.mul_(module.groups**0.5)


def _check_torchvision(name: str) -> None:
    from torchvision import models

    known = [str(model) for model in models.list_models(module=models)]
    if name not in known:
        close = difflib.get_close_matches(name, [*known, LITE], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(
            f"network {name!r} is not one of torchvision's classifiers{hint} (timm's are called timm/NAME)"
        )


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"network {name!r} needs timm: pip install 'ssl3d[timm]'") from error
    # Only registered names: others would be fetched from the hub, or read as paths.
    plain = name.removeprefix(TIMM).partition(".")[0]
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(TIMM + match for match in close)}?" if close else ""
        raise UsageError(f"network {name!r} is not one of timm's{hint}")
    return timm
