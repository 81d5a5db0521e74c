"""Names of the calls of a forward pass: a layer by its weight, what has no parameters by the layer before it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn


class Names:
    """The parameters and buffers of a model by name, and their names; read again when a tensor is not known."""

    def __init__(self) -> None:
        self._homes: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        self._names: dict[int, str] = {}
        self._held: list[Tensor] = []  # alive, so that no other tensor takes one of their numbers
        self._model: Any = None

    def of(self, model: nn.Module) -> Names:
        """For this model."""
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)
            self._read()
        return self

    def name(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer; None for another tensor."""
        found = self._names.get(id(tensor))
        if found is None and isinstance(tensor, nn.Parameter):
            self._read()  # the model was given another parameter
            found = self._names.get(id(tensor))
        return found

    def tensor(self, name: str | None) -> Tensor | None:
        """The parameter or buffer of that name, as it is now."""
        found = None if name is None else self._homes.get(name)
        return None if found is None else found[0][found[1]]

    def all(self) -> list[Tensor]:
        """Every parameter and buffer, once."""
        return list(self._held)

    def _read(self) -> None:
        self._homes, self._names, self._held = {}, {}, []
        for path, module in self._model().named_modules():
            for home in (module._parameters, module._buffers):
                for attribute, tensor in home.items():
                    if tensor is not None and id(tensor) not in self._names:
                        name = f"{path}.{attribute}" if path else attribute
                        self._names[id(tensor)] = name
                        self._homes[name] = (home, attribute)
                        self._held.append(tensor)

    def __reduce__(self) -> Any:
        return (Names, ())  # a copy, or a file, reads its own model


class Namer:
    """Names calls in the order in which a forward pass makes them."""

    def __init__(self, model: nn.Module, names: Names | None = None) -> None:
        self.names = (names or Names()).of(model)
        self._uses: dict[str, int] = {}
        self.last = "input"

    def name(self, tensor: Tensor | None) -> str | None:
        """The name of a parameter or buffer; None for another tensor."""
        return None if tensor is None else self.names.name(tensor)

    def layer(self, weight: Tensor) -> str:
        """The name of a layer's next call."""
        name = self.names.name(weight)
        path = f"{self.last}.computed" if name is None else name.removesuffix(".weight")
        self.last = self._numbered(path)
        return self.last

    def norm(self, weight: Tensor) -> str:
        """The name of a norm's next call."""
        return self._numbered((self.names.name(weight) or f"{self.last}.norm").removesuffix(".weight"))

    def other(self, operation: str) -> str:
        """The name of the next call of an operation without parameters."""
        return self._numbered(f"{self.last}/{operation}")

    def _numbered(self, name: str) -> str:
        count = self._uses.get(name, 0)
        self._uses[name] = count + 1
        return f"{name}#{count}" if count else name
