"""Whose the gradients of looked-up tables are: an optimizer's, for as long as it lives."""

import weakref
from collections.abc import Iterable

from sparsemix.layers.base import Layer
from sparsemix.ops.row_grad.factored import lend, take_back


def borrow(layers: list[Layer], owner: object) -> None:
    """From here on the layers' tables leave their gradients as factors, until `give_back` or the end of `owner`. What
    another optimizer had left there is dropped."""
    for layer in layers:
        layer.row_grads, layer.tables_owner = True, weakref.ref(owner)
        for name in layer.tables:
            table = layer.get_parameter(name)
            table.grad = None
            lend(table, owner)
    weakref.finalize(owner, _end, [weakref.ref(layer) for layer in layers]).atexit = False


def give_back(layers: Iterable[Layer], owner: object) -> None:
    """Those of the layers that are still the owner's have dense gradients again."""
    for layer in layers:
        if layer.tables_owner is not None and layer.tables_owner() is owner:
            layer.row_grads, layer.tables_owner = False, None
            for name in layer.tables:
                take_back(layer.get_parameter(name))


def _end(layers: list["weakref.ref[Layer]"]) -> None:
    # The owner is gone, so that it is None; who lent to another optimizer since keeps doing so.
    give_back([layer for ref in layers if (layer := ref()) is not None], None)
