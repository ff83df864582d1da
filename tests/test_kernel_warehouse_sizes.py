"""Parameters of the KernelWarehouse authors' networks, from shapes alone."""

import pytest
import torch

from morse.modules import Warehouse

# Single stages may grow where whole networks shrink.
pytestmark = pytest.mark.filterwarnings("ignore:this warehouse does not save")


class Network:
    """Counts the parameters of a network of dynamic convolutions; `banks` by the authors' names."""

    def __init__(self, static, **settings):
        self.static, self.settings, self.banks = static, settings, {}

    def conv(self, bank, in_channels, out_channels, kernel=1, groups=1, **more):
        """A convolution with batch norm; plain where `bank` is None."""
        self.static += 2 * out_channels
        if bank is None:
            self.static += out_channels * (in_channels // groups) * kernel**2
            return
        if bank not in self.banks:
            self.banks[bank] = Warehouse(**(self.settings | more))
        self.banks[bank].conv2d(in_channels, out_channels, kernel, groups=groups)

    @property
    def parameters(self):
        return self.static + sum(bank.build().plan.parameters for bank in self.banks.values())


def resnet(bottleneck, **settings):
    """ResNet18 or ResNet50; a stage's first convolutions join the bank of the stage before."""
    net, channels = Network(64 * 3 * 49 + 2 * 64, **settings), 64
    depths = (3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), depths, strict=True)):
        out_channels = width * (4 if bottleneck else 1)
        for block in range(blocks):
            first = stage if block else stage - 1
            if bottleneck:
                net.conv(first if first >= 0 else None, channels, width)
                net.conv(stage, width, width, 3)
                net.conv(stage, width, out_channels)
            else:
                net.conv(max(first, 0), channels, width, 3)
                net.conv(stage, width, width, 3)
            if block == 0 and channels != out_channels:
                net.conv(stage - 1 if stage else None, channels, out_channels)
            channels = out_channels
    net.static += (channels + 1) * 1000
    return net.parameters


MOBILENET = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]


def mobilenet(pointwise, half=False, **settings):
    """MobileNetV2-1.0; the half budget shares only what is large, and the classifier too.

    Args:
        pointwise: Whether both 1x1 convolutions of a block have one bank or one each.
    """
    net, channels, stages = Network(0, **settings), 32, (1, 2, 3, 4, 5, 6, 6)
    dense = {"budget": 0.5, "cell_in_ratio": 0.5, "cell_out_ratio": 0.5} if half else {}
    net.conv("first", 3, 32, 3)
    for index, ((expand, width, blocks), own) in enumerate(zip(MOBILENET, stages, strict=True)):
        for block in range(blocks):
            changes = block == 0 and index > 0 and own != stages[index - 1]
            stage, hidden = own - changes, channels * expand
            names = [(stage, "pw"), (stage, "pw")] if pointwise else [(stage, 0), (stage, 1)]
            if half and stage < 6:
                names = [None, None]
            if expand > 1:
                net.conv(names[0], channels, hidden, **dense)
            net.conv((stage, "dw"), hidden, hidden, 3, groups=hidden)
            net.conv(names[1], hidden, width, **dense)
            channels = width
    net.conv((6, "pw") if pointwise else (6, 1), channels, 1280, **dense)
    if half:
        classifier = Warehouse(**(settings | {"budget": 0.5, "cell_in_ratio": 0.025}))
        classifier.linear(1280, 1000, bias=True)
        net.banks["classifier"], net.static = classifier, net.static + 1000
    else:
        net.static += 1281 * 1000
    return net.parameters


HALVES = {"cell_in_ratio": 0.5, "cell_out_ratio": 0.5}


@pytest.mark.parametrize(
    "build, arguments, settings, total",
    [
        (resnet, [False], {"budget": 0.25, **HALVES}, 4_031_768),
        (resnet, [False], {"budget": 0.5, **HALVES}, 7_431_044),
        (resnet, [False], {"budget": 1}, 11_932_148),
        (resnet, [False], {"budget": 2}, 23_242_127),
        (resnet, [False], {"budget": 4}, 45_862_085),
        (resnet, [True], {"budget": 0.5, **HALVES, "basis_ratio": 1 / 16}, 17_638_264),
        (resnet, [True], {"budget": 1}, 28_052_310),
        (resnet, [True], {"budget": 4}, 102_015_144),
        (mobilenet, [False, True], {"reduction": 1 / 32}, 2_654_396),
        (mobilenet, [True], {"budget": 1}, 5_168_146),
        (mobilenet, [False], {"budget": 4}, 11_379_382),
    ],
)
def test_networks_have_the_authors_size(build, arguments, settings, total):
    with torch.device("meta"):
        assert build(*arguments, **settings) == total
