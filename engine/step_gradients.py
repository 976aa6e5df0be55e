"""Forward pass, loss and way back of one training step, as they are, compiled, or as one CUDA graph (torch).

A small network on a fast GPU spends most of a step on starting its many kernels one by one; a graph starts them at
once. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.compilation import Compile, Gradients, Way

Precision = Literal["float32", "bf16", "fp16"]
Forward = Callable[[Tensor], Any]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REHEARSALS = 3  # as many as torch's documentation has before a capture


class StepGradients:
    """Computes the gradients of `network` for `loss`, which takes the network's outputs and labels. With a `scaler`
    (fp16) the gradients are scaled by it, the loss is not."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Sequence[Tensor], Tensor], Tensor],
        *,
        device: torch.device,
        precision: Precision,
        memory_format: torch.memory_format,
        scaler: torch.amp.GradScaler | None,
        compile_network: Callable[[nn.Module], Forward] = torch.compile,
    ) -> None:
        self._network, self._loss = network, loss
        self._device, self._kind = device, _AUTOCAST.get(precision)
        self._format = memory_format
        self._scaler = scaler
        self._compile_network = compile_network

    def logits(self, images: Tensor, forward: Forward | None = None) -> list[Tensor]:
        """All outputs of the network, or of `forward` in its place, in this precision."""
        autocast: AbstractContextManager[Any] = (
            nullcontext() if self._kind is None else torch.autocast(self._device.type, self._kind)
        )
        with autocast:
            forward = self._network if forward is None else forward
            outputs: list[Tensor] = forward(images.contiguous(memory_format=self._format))
        return outputs

    def through(self, forward: Forward) -> Gradients:
        """One kernel after the other."""

        def compute(images: Tensor, labels: Tensor) -> Tensor:
            self._forget()
            loss = self._loss(self.logits(images, forward), labels)
            scaled = loss if self._scaler is None else self._scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return compute

    def ways(self, mode: Compile, *, alone: bool) -> list[Way]:
        """What may be faster than `through(network)`. With `mode` "on" the compiler is used in any case,
        where it works; graphs are for
        a GPU and a process that trains `alone`, since others take part in the loss."""
        if mode == "off":
            return []
        compiled = _Once(self._compiled)
        graphs = self._device.type == "cuda" and alone
        ways = [Way("compiled", lambda images, _: self.through(compiled(images)), wanted=mode == "on")]
        if graphs and mode == "auto":
            ways.append(Way("as a CUDA graph", lambda *batch: self._captured(self._network, *batch)))
        if graphs:
            ways.append(
                Way(
                    "compiled and as a CUDA graph",
                    lambda images, labels: self._captured(compiled(images), images, labels),
                )
            )
        return ways

    def _compiled(self, images: Tensor) -> Forward:
        """Forward and backward without a step, and without the loss, in which other processes take part: that is when
        compilation happens, and fails."""
        forward = self._compile_network(self._network)
        outputs = self.logits(images, forward)
        torch.stack([output.float().mean() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        self._forget()
        return forward

    def _captured(self, forward: Forward, images: Tensor, labels: Tensor) -> Gradients:
        """Raises RuntimeError where the GPU has not the memory for a graph beside what there is."""
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        # The graph keeps what a step needs at most; the loader's threads go on meanwhile.
        needed = 2 * torch.cuda.max_memory_allocated(self._device)
        if free < needed:
            raise RuntimeError(f"{free / 2**20:,.0f} MiB of the GPU are free, and {needed / 2**20:,.0f} are needed")
        try:
            return CapturedGradients(self.through(forward), list(self._network.parameters()), images, labels)
        finally:
            self._forget()

    def _forget(self) -> None:
        for parameter in self._network.parameters():
            parameter.grad = None


class CapturedGradients:
    """What `compute` does, as a CUDA graph for batches of the shape of this one. Raises RuntimeError where it cannot be
    captured."""

    def __init__(self, compute: Gradients, parameters: Sequence[nn.Parameter], images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        device = images.device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(_REHEARSALS):
                compute(self._images, self._labels)
        torch.cuda.current_stream(device).wait_stream(beside)
        for parameter in parameters:
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: those that make batches go on.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = compute(self._images, self._labels)
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss


class _Once:
    """The network is compiled for the first of the ways that want it."""

    def __init__(self, make: Callable[[Tensor], Forward]) -> None:
        self._make = make
        self._made: Forward | None = None

    def __call__(self, images: Tensor) -> Forward:
        if self._made is None:
            self._made = self._make(images)
        return self._made
