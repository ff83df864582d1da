"""Omni-dimensional dynamic convolution (ODConv): a convolution whose kernel follows its input.

Source: Li, Zhou and Yao, "Omni-Dimensional Dynamic Convolution", ICLR 2022 (arXiv 2209.07947).
Equation 2 gates each of the n candidate kernels on its own on three axes. Like the authors' code,
`ODConv2d` computes one gate an axis for all candidates; parameters and their names are theirs.

Shapes: B samples, I input and O output channels, k x k taps, g groups, n candidates; R rows of
attention, which is B, or 1 when all samples share one conditioning row.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.kernel_stack import KernelStack, add_bias, convolve, kaiming_
from morse.modules.odconv_attention import (
    AttentionNorm,
    KernelAttention,
    assemble_kernel,
    check_inputs,
    check_sizes,
    check_source,
    head_widths,
    hidden_width,
    mix_candidates,
    square,
)
from morse.modules.temperature import WithTemperature

Init = Literal["official", "identity"]


class ODConv2d(WithTemperature, KernelStack):
    """A convolution with one kernel a sample: (B, I, H, W) -> (B, O, H', W').

    A small squeeze-and-excite head turns the pooled input, or `cond`, into four attentions. Its
    width is h = max(int(I * reduction), min_hidden). A 1x1 kernel has no spatial gate, a single
    candidate no kernel attention, and a depthwise layer (I = O = g) no filter gate.

    State dicts have the authors' names, so theirs load as they are. The temperature is in ours
    alone, a buffer; after loading theirs it is 1.

    >>> import torch
    >>> from morse.modules import ODConv2d, linear_temperature, set_temperature
    >>> conv = ODConv2d(8, 16, kernel_size=3, padding=1, attention_norm="layer")
    >>> set_temperature(conv, linear_temperature(step=50, total=100))
    1
    >>> x = torch.ones(2, 8, 5, 5)
    >>> conv(x).shape, conv.assembled_kernel(x).shape, conv.temperature.item()
    (torch.Size([2, 16, 5, 5]), torch.Size([2, 16, 8, 3, 3]), 15.5)

    Args:
        in_channels: Input channels I.
        out_channels: Output channels O.
        kernel_size: Taps k along both axes; a pair must be square.
        stride: As in `torch.nn.Conv2d`.
        padding: As there, in numbers.
        dilation: As there.
        groups: Groups g; divides I and O.
        bias: Add a plain bias after the filter gate. The authors' layer has none.
        kernel_num: Candidate kernels n, at least 1.
        reduction: Width of the attention's hidden layer relative to I, above 0.
        min_hidden: The least width of that layer.
        attention_norm: Norm of the hidden layer. "batch" is the authors' and cannot train on a
            single row; "layer", "group" (up to 4 groups) and "none" can.
        temperature: Divides all attention logits, the sigmoids' too; above 0.
        cond_dim: Width of the conditioning vector (such as a time embedding) that the attention
            reads in place of pooled features; None to read features.
        init: "official" draws everything with Kaiming's normal rule (fan-out, ReLU): the gates
            begin near 1/2, hence outputs at about 1/8 of a plain convolution's. "identity" begins
            as a plain convolution at any temperature.

    Raises:
        ValueError: If an argument is out of its range.
    """

    final_temperature, own_weight = 1.0, "weight"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        kernel_num: int = 4,
        reduction: float = 1 / 16,
        min_hidden: int = 16,
        attention_norm: AttentionNorm = "batch",
        temperature: float = 1.0,
        cond_dim: int | None = None,
        init: Init = "official",
    ) -> None:
        """Create the candidates and the attention, and initialise both."""
        super().__init__()
        check_sizes(in_channels, out_channels, groups, kernel_num, cond_dim)
        if init not in ("official", "identity"):
            raise ValueError(f"init must be 'official' or 'identity', got {init!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = square(kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.kernel_num, self.cond_dim, self.init = kernel_num, cond_dim, init
        self._begin_at(temperature)
        self.weight = nn.Parameter(
            torch.empty(kernel_num, out_channels, in_channels // groups, *2 * (self.kernel_size,))
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        hidden = hidden_width(in_channels, reduction, min_hidden)
        widths = head_widths(in_channels, out_channels, self.kernel_size, groups, kernel_num)
        self.attention = KernelAttention(cond_dim or in_channels, hidden, widths, attention_norm)
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        kernel_num: int = 4,
        *,
        noise: float = 0.1,
        reduction: float = 1 / 16,
        min_hidden: int = 16,
        attention_norm: AttentionNorm = "batch",
        temperature: float = 1.0,
        cond_dim: int | None = None,
    ) -> "ODConv2d":
        """Make a layer that begins as `conv` at any temperature.

        Args:
            conv: The source, which is copied: square kernel, padding with zeros, in numbers.
            kernel_num: Candidates n: the source's kernel with noise that sums to zero over them.
            noise: Its spread relative to Kaiming's, at least 0; with 0 they would never part.
            reduction: As for the class, like the rest.
            min_hidden: See there.
            attention_norm: See there.
            temperature: See there.
            cond_dim: See there.

        Raises:
            TypeError: If `conv` is not a `torch.nn.Conv2d`.
            ValueError: If its kernel or padding is another, or an argument out of range.
        """
        check_source(conv, noise)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, kernel_num=kernel_num,
            reduction=reduction, min_hidden=min_hidden, attention_norm=attention_norm,
            temperature=temperature, cond_dim=cond_dim, init="identity",
        ).to(conv.weight)  # fmt: skip
        layer._spread_candidates(conv.weight, noise)
        if conv.bias is not None:
            layer.bias.data.copy_(conv.bias)
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew, as `init` says."""
        self.attention.reset_parameters(zero_heads=self.init == "identity")
        for candidate in self.weight:
            kaiming_(candidate)
        if self.init == "identity":
            self._spread_candidates(self.weight[0].clone(), noise=0.1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _spread_candidates(self, kernel: Tensor, noise: float) -> None:
        """Place the candidates around `kernel` (O, I/g, k, k), undoing gates that stand at 1/2."""
        offsets = torch.empty_like(self.weight)
        for offset in offsets:
            kaiming_(offset)
        # Uniform attention averages the candidates, where offsets that sum to zero vanish.
        offsets = noise * (offsets - offsets.mean(0))
        self.weight.copy_((kernel + offsets) * 2**self.attention.num_gates)

    @staticmethod
    def checked_temperature(temperature: float) -> float:
        """Return what divides the attention logits; ValueError unless finite and above 0."""
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and above 0, got {temperature}")
        return float(temperature)

    def attentions(self, x: Tensor, cond: Tensor | None = None) -> dict[str, Tensor | None]:
        """Compute the four attentions; None where the layer lacks one.

        Args:
            x: Input, (B, I, H, W).
            cond: Conditioning, (B or 1, cond_dim), for a layer with `cond_dim` and no other.

        Returns:
            "channel" (R, I), "filter" (R, O) and "spatial" (R, k, k), each in (0, 1), and "kernel"
            (R, n), whose rows sum to 1.

        Raises:
            ValueError: If a shape or `cond` does not fit, or batch norm is to train on one row.
        """
        check_inputs(x, cond, self.in_channels, self.cond_dim)
        source = x.mean((2, 3)) if cond is None else cond
        return self.attention(source, self._read_temperature())

    def assembled_kernel(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Assemble each sample's kernel with all four attentions (ODConv, Equation 2).

        Takes and raises what `attentions` does; returns (B, O, I/g, k, k), a view of one kernel
        when `cond` has one row.
        """
        kernel = assemble_kernel(self.weight, self.attentions(x, cond), self.groups)
        return kernel.expand(len(x), *kernel.shape[1:])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Convolve each sample with its own kernel.

        Takes and raises what `attentions` does; returns (B, O, H', W').
        """
        gates = self.attentions(x, cond)
        place = self.stride, self.padding, self.dilation
        if len(x) == 0:  # any kernel serves no sample, and one gives the result its shape
            return add_bias(convolve(x, self.weight[:1], place, self.groups), self.bias)
        if len(gates["channel"]) == 1:
            kernel = assemble_kernel(self.weight, gates, self.groups)[0]
            return functional.conv2d(x, kernel, self.bias, *place, self.groups)
        # Gating the input and the output costs less than gating every sample's kernel.
        x = x * gates["channel"][:, :, None, None]
        y = convolve(x, mix_candidates(self.weight, gates), place, self.groups)
        if gates["filter"] is not None:
            y = y * gates["filter"][:, :, None, None]
        return add_bias(y, self.bias)
