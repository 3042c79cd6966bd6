"""The hosts that are known by name. To add one, write its file and add one line to `HOSTS`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Dict, List, Union

from .sources import CamSource

__all__ = ["HOSTS", "make_source", "names"]

# Name of the host, which is also the name of its module in this package -> name of its CamSource there.
HOSTS: Dict[str, str] = {
    "dupl": "DuPL",
    "excel": "ExCEL",
    "generic": "Generic",
    "mctformer": "MCTformer",
    "recam": "ReCAM",
    "toco": "ToCo",
    "transcam": "TransCAM",
    "weaktr": "WeakTr",
    "weclip": "WeCLIP",
}


def names() -> List[str]:
    """The hosts that `attach` knows by name."""
    return sorted(HOSTS)


def make_source(host: Union[str, CamSource], **options: Any) -> CamSource:
    """Build the `CamSource` of a host.

    Args:
        host: a name of `names()`, or a `CamSource`, which is returned as it is.
        **options: of the host's class, such as `cam="patch"`.

    Raises:
        ValueError: if there is no host of that name.
        TypeError: if the host has no such option, or options are given for a `CamSource`.

    Example:
        >>> make_source("mctformer", cam="patch").name
        'MCTformer'
    """
    if isinstance(host, CamSource):
        if options:
            raise TypeError(
                f"Options such as {next(iter(options))!r} belong to hosts given by name; set them on your CamSource."
            )
        return host
    if host not in HOSTS:
        raise ValueError(f"The host must be one of {', '.join(map(repr, names()))} or a CamSource; got {host!r}.")
    module = importlib.import_module(f".{host}", __package__)
    kind = getattr(module, HOSTS[host])
    known = list(inspect.signature(kind).parameters)
    for name in options:
        if name not in known:
            raise TypeError(f"The host {host!r} has no option {name!r}; its options are {', '.join(known)}.")
    source: CamSource = kind(**options)
    return source
