"""Whether a Hugging Face folder computes what the shrunk network computes: inputs, answers, a decoder's cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.deploy.parity import MAX_RELATIVE_ERROR, Runner
from palmette.deploy.plain import one_line
from palmette.errors import ExportError
from palmette.graph.capture import capture, make_inputs
from palmette.graph.inputs import Example, batch_size, call, main_output, map_tensors, with_batch


def random_inputs(network: fx.GraphModule, source: Any) -> Any:
    """Inputs of the shapes that the network was captured with: noise, tokens of the vocabulary, masks of ones."""
    description = network.meta["palmette"]["inputs"]
    example = make_inputs(description)
    if not isinstance(example, dict):
        return example
    generator = torch.Generator().manual_seed(0)
    size = int(getattr(source.config.get_text_config(), "vocab_size", 0) or 0)

    def draw(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_floating_point():
            return value
        if name.endswith("mask"):
            return torch.ones_like(value)
        return torch.randint(size // 2, size, value.shape, generator=generator) if name == "input_ids" else value

    return {name: draw(name, value) for name, value in example.items()}


class Proof:
    """The shrunk network's answers, and the inputs on which a loaded folder must give the same."""

    def __init__(self, network: nn.Module, example: Example, batches: Iterable[Any] | None) -> None:
        self.network = capture(network, example).cpu().eval()
        self.example = map_tensors(lambda t: t.detach().cpu(), with_batch(example, max(2, batch_size(example))))
        self.batches = [*self._padded(), *map(self._complete, itertools.islice(batches or (), 2))]

    def _complete(self, batch: Any) -> Any:
        """A batch of a dict with the entries of the example that are no tensors."""
        inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
        if not isinstance(self.example, dict) or not isinstance(inputs, dict):
            return batch
        return {name: inputs.get(name, value) for name, value in self.example.items()}

    def reference(self, inputs: Any) -> list[Tensor]:
        """The shrunk network's logits."""
        return _runner(self.network)(inputs)

    def _padded(self) -> Iterator[Any]:
        """The example with every other sample padded behind, and in front."""
        mask = self.example.get("attention_mask") if isinstance(self.example, dict) else None
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > 1:
            half = mask.shape[1] // 2
            for side in (slice(half, None), slice(None, half)):
                padded = torch.ones_like(mask)
                padded[::2, side] = 0
                yield {**self.example, "attention_mask": padded}


def _runner(model: nn.Module) -> Runner:
    def run(inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            logits: Tensor = main_output(call(model, inputs))
            return [logits]

    return run


def answers(loaded: nn.Module) -> Runner:
    """The folder's model; what it cannot run is an ExportError."""
    run = _runner(loaded)

    def checked(inputs: Any) -> list[Tensor]:
        try:
            return run(inputs)
        except Exception as error:
            raise ExportError("The folder's model cannot run the network's inputs", why=one_line(error)) from error

    return checked


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def cache_error(loaded: Any, example: Any) -> float | None:
    """How far the next token's logits with a cache of keys and values lie from those without; None without a cache."""
    ids = example.get("input_ids") if isinstance(example, dict) else None
    if ids is None or ids.shape[1] < 2 or not loaded.can_generate() or loaded.config.is_encoder_decoder:
        return None
    try:
        with torch.no_grad():
            whole = loaded(input_ids=ids, use_cache=False).logits[:, -1]
            cache = getattr(loaded(input_ids=ids[:, :-1], use_cache=True), "past_key_values", None)
            if cache is None:
                return None
            step = loaded(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    except Exception as error:
        raise ExportError("The folder's model cannot use its cache of keys and values", why=one_line(error)) from error
    error_ = _relative(whole.double(), step.double())
    if not error_ <= MAX_RELATIVE_ERROR:
        raise ExportError(
            f"The folder's model answers differently with its cache of keys and values, by {error_:.1e}",
            why="a layer without its attention leaves its place in the cache empty",
            fix="Drop whole layers of a model that generates (for instance block_influence with sites='layer').",
        )
    return error_
