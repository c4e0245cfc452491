"""Proxies of a run with their trained heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl3d import plugins
from ssl3d.checkpoint.card import CARD, plugin_record, read_card
from ssl3d.checkpoint.outline import Outline
from ssl3d.checkpoint.snapshot import config_of, load_checkpoint
from ssl3d.checkpoint.weights import load_strictly
from ssl3d.config import from_dict
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, PluginError

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.proxy import Proxy


def load_proxies(run: str | Path, data: Collection | None = None) -> dict[str, Proxy]:
    """Load the proxies of a run with their trained heads, on its encoder, in evaluation mode.

    Args:
        run: Folder of a run, whose newest intact checkpoint is read.
        data: Data of the run, for a proxy that needs more of them than the checkpoint keeps: their number,
            shapes, spacings, and which volumes belong to one subject.

    Raises:
        CheckpointError: The folder is no run, no checkpoint can be read, or a proxy needs its data.
    """
    run = Path(run)
    config = config_of(run)
    checkpoint = load_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(
            f"{run}: has no checkpoint yet; ssl3d pretrain --resume {run} goes on with it"
        )
    state = checkpoint["module"]
    spec, about = checkpoint["spec"], checkpoint.get("about") or {}

    def load(group: str, name: str) -> Any:
        try:
            return plugins.load_recorded(group, name, plugin_record(about, name))
        except PluginError as error:
            raise CheckpointError(f"{run}: {error}") from error

    kind = load(plugins.ENCODERS, spec["encoder"])
    with torch.random.fork_rng(devices=[]):
        where = f"{run}, {spec['encoder']}"
        encoder: Encoder = kind(from_dict(kind.Config, spec["encoder_config"], where, recorded=True))
        proxies: dict[str, Proxy] = {}
        for name, options in spec["proxies"].items():
            proxy_class = load(plugins.PROXIES, name)
            own_config = from_dict(proxy_class.Config, options, f"{run}, {name}", recorded=True)
            proxy = proxy_class(own_config, encoder)
            sized: Any = data
            if data is None and checkpoint.get("outline"):
                sized = Outline(checkpoint["outline"], f"load_proxies({str(run)!r}, data)", name)
            if sized is not None:
                proxy.setup(sized)
            prefix = f"proxies.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            where = f"{run}, proxy {name}" + ("" if sized is not None else " (without its data)")
            load_strictly(proxy, own, where, name)
            proxies[name] = proxy.eval()
    card = run / "encoder" / CARD
    encoder.metadata = read_card(card.parent) if card.is_file() else {"config": config}
    return proxies
