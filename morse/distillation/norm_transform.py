"""NORM's feature transform, which training adds to a student and `fold` removes again.

X. Liu, L. Li, C. Li, A. Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching",
ICLR 2023, arXiv:2305.13803. A linear map widens the student's feature to N times the teacher's
channels, which `norm.py` compares with the teacher; a second one shrinks it back. Being linear, the
transform folds into the next layer after training and costs nothing at inference.
"""

import copy
from typing import Literal, Self

import torch
from torch import Tensor, nn

from morse.distillation.functional import check_fits


class NORMTransform(nn.Module):
    """The feature transform, E = BN1(W1 F) and O = BN2(W2 E) + F (NORM, arXiv:2305.13803).

    It stands in the student where `out` replaces the feature F; `NORMLoss` takes `expanded`.

    Args:
        in_channels: Cs, channels of the student's feature, at least 1.
        teacher_channels: Ct, channels of the teacher's feature, at least 1.
        n: Number of segments N, at least 1.
        residual: Whether F is added; without it this is the paper's "plain" transform.
        norm: "none" leaves both batch normalisations out, so that no statistics of different
            diffusion timesteps mix.
        eps: Of the batch normalisations, above 0.
        momentum: Of their running statistics, in [0, 1].
        init: "official" draws both convolutions from Kaiming's normal distribution (fan out), after
            which the transform changes the feature; "identity" (not in the paper) sets W2 = 0, so
            that O = F at first, as a network that works already requires.

    Raises:
        ValueError: For an argument out of its range, and for init="identity" without the residual.

    Example:
        >>> import torch
        >>> from morse.distillation import NORMTransform
        >>> transform, feature = NORMTransform(6, 8, n=4).eval(), torch.randn(2, 6, 5, 5)
        >>> out, expanded = transform(feature)
        >>> out.shape, expanded.shape
        (torch.Size([2, 6, 5, 5]), torch.Size([2, 32, 5, 5]))
        >>> layer = torch.nn.Conv2d(6, 3, 1)
        >>> torch.allclose(transform.fold(layer)(feature), layer(out), atol=1e-4)
        True
    """

    def __init__(
        self,
        in_channels: int,
        teacher_channels: int,
        n: int = 8,
        *,
        residual: bool = True,
        norm: Literal["batch", "none"] = "batch",
        eps: float = 1e-5,
        momentum: float = 0.1,
        init: Literal["official", "identity"] = "official",
    ) -> None:
        """Create both 1x1 convolutions and, unless norm="none", their batch normalisations."""
        super().__init__()
        counts = {"in_channels": in_channels, "teacher_channels": teacher_channels, "n": n}
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be 'batch' or 'none', got {norm!r}.")
        if init not in ("official", "identity"):
            raise ValueError(f"init must be 'official' or 'identity', got {init!r}.")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps!r}.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum!r}.")
        if init == "identity" and not residual:
            raise ValueError(
                "init='identity' needs residual=True: with W2 = 0 nothing else is left."
            )
        self.in_channels, self.teacher_channels = in_channels, teacher_channels
        self.n, self.residual = n, residual

        def make_norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, eps, momentum) if norm == "batch" else nn.Identity()

        width = n * teacher_channels
        self.expand = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.expand_norm = make_norm(width)
        self.contract = nn.Conv2d(width, in_channels, kernel_size=1, bias=False)
        self.contract_norm = make_norm(in_channels)
        nn.init.kaiming_normal_(self.expand.weight, mode="fan_out")
        if init == "identity":
            nn.init.zeros_(self.contract.weight)
        else:
            nn.init.kaiming_normal_(self.contract.weight, mode="fan_out")

    def forward(self, x: Tensor, channels_last: bool = False) -> tuple[Tensor, Tensor]:
        """Transform the student's feature.

        Args:
            x: F, (B, Cs, H, W), or tokens (B, L, Cs) with `channels_last`.
            channels_last: Whether `x` are tokens.

        Returns:
            `out`, shaped like `x`, and `expanded`, (B, N*Ct, H, W) or (B, L, N*Ct); segment k is
            the block of channels from k*Ct to (k+1)*Ct. `NORMLoss` takes maps alone: give it
            expanded tokens as `expanded.transpose(1, 2).unflatten(2, (H, W))`.

        Raises:
            ValueError: If `x` has another number of dimensions or of channels.
        """
        rank, axis, form = (3, 2, "(B, L, Cs)") if channels_last else (4, 1, "(B, Cs, H, W)")
        if x.ndim != rank or x.shape[axis] != self.in_channels:
            raise ValueError(
                f"x must be {form} with Cs={self.in_channels} for channels_last={channels_last}, "
                f"got shape {tuple(x.shape)}."
            )
        feature = x.transpose(1, 2).unsqueeze(-1) if channels_last else x
        expanded = self.expand_norm(self.expand(feature))
        out = self.contract_norm(self.contract(expanded))
        if self.residual:
            out = out + feature
        if channels_last:
            return out.squeeze(-1).transpose(1, 2), expanded.squeeze(-1).transpose(1, 2)
        return out, expanded

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """Return M, (Cs, Cs), and c, (Cs,), with O = M F + c in every position.

        They are computed in float64 and returned detached, in the parameters' dtype.

        Raises:
            RuntimeError: If a batch normalisation is in training mode.
        """
        matrix, shift = self._affine()
        return matrix.to(self.expand.weight), shift.to(self.expand.weight)

    def fold(self, next_layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
        """Return a copy of the next layer that does the transform's work too.

        The layer (W, d) becomes (W M, d + W c), computed in float64; class, shapes and parameter
        names stay, so nothing of the transform remains. Average pooling may lie between the two, an
        activation may not.

        Args:
            next_layer: A Linear or an ungrouped Conv2d with Cs input channels; left as it is.

        Raises:
            TypeError: If it is another kind of layer, subclasses and reparametrised ones included.
            ValueError: If its input channels are not Cs; if it has groups; where c is not 0, if it
                has no bias to take c up, or pads with zeros, which c would have to reach.
            RuntimeError: If a batch normalisation is in training mode.
        """
        _check_kind(next_layer, self.in_channels)
        matrix, shift = self._affine()
        if shift.any():
            _check_takes_shift(next_layer)
        folded = copy.deepcopy(next_layer)
        weight = _exact(next_layer.weight)
        with torch.no_grad():
            folded.weight.copy_(torch.einsum("oc...,cd->od...", weight, matrix))
            if folded.bias is not None:
                # Away from zero padding, every tap of the kernel sees the same shift.
                taps = weight.reshape(*weight.shape[:2], -1).sum(-1)
                folded.bias.copy_(_exact(next_layer.bias) + taps @ shift)
        return folded

    def load_official(self, state_dict: dict[str, Tensor], prefix: str = "layer3") -> Self:
        """Load the transform from a state dict of the authors' code (OSVAI/NORM).

        Args:
            state_dict: A student's state dict; all entries but the transform's are ignored.
            prefix: What stands before "1" and "2" in the names, "layer4" in their MobileNetV2 and
                ImageNet ResNets.

        Raises:
            ValueError: If this transform has no batch normalisation, or if one of the 12 entries is
                missing, has another shape or has company; then nothing is loaded.
        """
        if isinstance(self.expand_norm, nn.Identity):
            raise ValueError("official weights need norm='batch'; this transform has norm='none'.")
        names = {
            f"{prefix}1.0.": "expand.",
            f"{prefix}1.1.": "expand_norm.",
            f"{prefix}2.0.": "contract.",
            f"{prefix}2.1.": "contract_norm.",
        }
        found = {
            ours + name.removeprefix(official): tensor
            for official, ours in names.items()
            for name, tensor in state_dict.items()
            if name.startswith(official)
        }
        check_fits(found, self, f"state_dict under prefix={prefix!r}")
        self.load_state_dict(found)
        return self

    def _affine(self) -> tuple[Tensor, Tensor]:  # in float64 on the CPU
        first, first_shift = _layer_affine(self.expand, self.expand_norm)
        second, second_shift = _layer_affine(self.contract, self.contract_norm)
        matrix = second @ first
        if self.residual:
            matrix = matrix + torch.eye(self.in_channels, dtype=matrix.dtype, device=matrix.device)
        return matrix, second @ first_shift + second_shift


def _layer_affine(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64 on the CPU, of a 1x1 convolution with its normalisation."""
    weight = _exact(conv.weight).flatten(1)
    if isinstance(norm, nn.Identity):
        return weight, weight.new_zeros(len(weight))
    if norm.training:
        raise RuntimeError("batch normalisation in training mode is not affine; call eval() first.")
    scale = _exact(norm.weight) / (_exact(norm.running_var) + norm.eps).sqrt()
    return scale[:, None] * weight, _exact(norm.bias) - scale * _exact(norm.running_mean)


def _exact(tensor: Tensor) -> Tensor:
    # On the CPU, since not every accelerator has float64.
    return tensor.detach().to("cpu", torch.float64)


def _check_kind(layer: nn.Module, in_channels: int) -> None:
    # A subclass or a parametrisation may do more with the weight than the formula knows.
    plain = {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}
    if type(layer) not in (nn.Linear, nn.Conv2d) or not plain:
        raise TypeError(f"next_layer must be a plain Linear or Conv2d, got {type(layer).__name__}.")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise TypeError("next_layer has hooks, which its copy would run as well; remove them first")
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if channels != in_channels:
        raise ValueError(f"next_layer must have {in_channels} input channels, got {channels}.")
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ValueError(f"next_layer must have groups=1, got {layer.groups}.")


def _check_takes_shift(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.bias is None:
        raise ValueError("next_layer must have a bias to take the shift up; give it a zero one.")
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return
    same = layer.padding == "same" and max(layer.kernel_size) > 1
    pads = same if isinstance(layer.padding, str) else any(layer.padding)
    if pads:
        raise ValueError(
            f"next_layer pads with zeros (padding={layer.padding!r}), which the transform's shift "
            "would change; use padding_mode='replicate', or norm='none', whose shift is 0."
        )
