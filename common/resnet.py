"""ResNet-18 and ResNet-50 (He et al. 2016) with torchvision's state_dict keys, any number of channels and any image size.

At width 64 and stem "imagenet" the keys and shapes are torchvision's, so its weight files load (`load_backbone`).
Stem "small" (3x3, stride 1, no pooling) keeps a usable feature map on images under 100 pixels.
"""
import torch
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv_bn(c_in, c_out, kernel, stride=1):
    """A convolution that keeps the sides (over stride) and its batch norm: two modules."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (B, c_in, h, w) -> (B, c, h / stride, w / stride)."""
    expansion = 1

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c, 3, stride)
        self.conv2, self.bn2 = conv_bn(c, c, 3)
        self.downsample = nn.Sequential(*conv_bn(c_in, c, 1, stride)) if stride > 1 or c_in != c else None

    def forward(self, x):
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h))
        return (h + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a skip: (B, c_in, h, w) -> (B, 4c, h / stride, w / stride)."""
    expansion = 4

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c, 1)
        self.conv2, self.bn2 = conv_bn(c, c, 3, stride)         # the stride sits on the 3x3, as in torchvision
        self.conv3, self.bn3 = conv_bn(c, 4 * c, 1)
        self.downsample = nn.Sequential(*conv_bn(c_in, 4 * c, 1, stride)) if stride > 1 or c_in != 4 * c else None

    def forward(self, x):
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h)).relu()
        h = self.bn3(self.conv3(h))
        return (h + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] -> logits (B, classes); `features` gives the map before pooling.

    depth 18 or 50; `width` channels in the first stage (64 in the paper); classes=0 leaves the last layer out.
    stem "imagenet" divides the sides by 32 in all, "small" by 8. `pretrained=True` says that ImageNet weights will be
    loaded: the input is then rescaled from [-1, 1] to the mean and spread that those were trained with.
    """

    def __init__(self, depth=18, channels=3, classes=1000, width=64, stem="imagenet", pretrained=False):
        super().__init__()
        block, blocks = {18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3))}[depth]
        self.depth, self.stem, self.pretrained, self.dim = depth, stem, pretrained, 8 * width * block.expansion
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for stage, n in enumerate(blocks):
            c, layers = width * 2 ** stage, []
            for i in range(n):
                layers.append(block(c_in, c, stride=2 if stage > 0 and i == 0 else 1))
                c_in = c * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        if classes:
            self.fc = nn.Linear(self.dim, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        mean, std = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        if pretrained and channels != 3:                        # gray: one mean and one spread
            mean, std = mean.mean(1, keepdim=True), std.mean(1, keepdim=True)
        self.register_buffer("mean", mean, persistent=False)    # not in the state_dict: its keys stay torchvision's
        self.register_buffer("std", std, persistent=False)

    def features(self, x):
        """(B, channels, H, W) -> (B, dim, h, w)."""
        if self.pretrained:
            x = ((x + 1) / 2 - self.mean) / self.std
        x = self.bn1(self.conv1(x)).relu()
        if self.stem == "imagenet":
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def load_backbone(net, weights):
    """Loads ImageNet weights (a state_dict with torchvision's keys) into `net`, leaving out the last layer.

    For one channel the first convolution's RGB kernels are summed. Raises ValueError naming the first key that does
    not fit (another depth or width, the small stem).
    """
    weights = {k.removeprefix("module."): v for k, v in weights.items() if not k.removeprefix("module.").startswith("fc.")}
    own = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    if "conv1.weight" in weights and own["conv1.weight"].shape[1] == 1:
        weights["conv1.weight"] = weights["conv1.weight"].sum(1, keepdim=True)
    for key, tensor in own.items():
        if key.endswith("num_batches_tracked"):                 # absent in old files, and of no effect here
            weights.setdefault(key, tensor)
        if key not in weights:
            raise ValueError(f"has no tensor {key}")
        if weights[key].shape != tensor.shape:
            raise ValueError(f"has {key} of shape {tuple(weights[key].shape)}, the network needs {tuple(tensor.shape)}")
    net.load_state_dict({k: weights[k] for k in own}, strict=False)
