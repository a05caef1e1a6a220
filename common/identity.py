"""How one part of a cluster proves to another who it is."""

from __future__ import annotations

from dataclasses import dataclass, field

CONTROLLER_NAME = "controller"  # in its certificate


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A certificate in this part's name with its key, and the authority whose certificates it accepts; PEM.

    The controller makes it (controller/authority.py) and hands it to a worker at its start. It is kept in memory only, and no
    log can show it: its representation is the name.
    """

    name: str
    authority: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
