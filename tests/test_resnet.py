"""common/resnet.py: torchvision's sizes and names, a second forward pass by torch's functions, and the loading of weights."""
import pytest
import torch
import torch.nn.functional as F

from common.resnet import BasicBlock, Bottleneck, ResNet, load_backbone

PARAMETERS = {18: 11_689_512, 50: 25_557_032}                            # torchvision's, 1000 classes
ENTRIES = {18: 122, 50: 320}                                             # of torchvision's state_dict
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


def meta(*args, **kwargs):
    """A network without memory: enough for names and shapes."""
    with torch.device("meta"):
        return ResNet(*args, **kwargs)


def worn(net):
    """Batch norms as after training: every scale, shift and running statistic its own."""
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(.5, 1.5), m.bias.data.normal_(0, .3), m.running_mean.normal_(0, .3), m.running_var.uniform_(.5, 2)
    return net.eval()


def torchvision_keys(depth):
    """The names in torchvision's resnet18 / resnet50 files, spelled out by its scheme."""
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv1.weight", *(f"bn1.{k}" for k in bn), "fc.weight", "fc.bias"]
    for stage, n in enumerate(BLOCKS[depth], 1):
        for i in range(n):
            block = f"layer{stage}.{i}."
            for j in range(1, 3 if depth == 18 else 4):
                keys += [f"{block}conv{j}.weight", *(f"{block}bn{j}.{k}" for k in bn)]
            if i == 0 and (stage > 1 or depth == 50):
                keys += [block + "downsample.0.weight", *(f"{block}downsample.1.{k}" for k in bn)]
    return keys


# ---------------------------------------------------------------------------------------------- oracle: torchvision
@pytest.mark.parametrize("depth", [18, 50])
def test_the_network_has_as_many_parameters_as_torchvisions(depth):
    assert sum(p.numel() for p in meta(depth).parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize("depth", [18, 50])
def test_the_state_dict_has_torchvisions_names_and_no_other(depth):
    keys = set(meta(depth).state_dict())
    assert keys == set(torchvision_keys(depth)) and len(keys) == ENTRIES[depth]


@pytest.mark.parametrize("depth, shapes", [
    (18, {"conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "layer1.0.conv1.weight": (64, 64, 3, 3), "layer4.1.bn2.num_batches_tracked": (),
          "layer2.0.downsample.0.weight": (128, 64, 1, 1), "layer4.1.conv2.weight": (512, 512, 3, 3), "fc.weight": (1000, 512), "fc.bias": (1000,)}),
    (50, {"layer1.0.conv1.weight": (64, 64, 1, 1), "layer1.0.conv2.weight": (64, 64, 3, 3), "layer1.0.conv3.weight": (256, 64, 1, 1),
          "layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer1.1.conv1.weight": (64, 256, 1, 1), "layer2.0.downsample.0.weight": (512, 256, 1, 1),
          "layer3.5.conv2.weight": (256, 256, 3, 3), "layer4.2.bn3.num_batches_tracked": (), "layer4.2.conv3.weight": (2048, 512, 1, 1),
          "fc.weight": (1000, 2048)})])
def test_tensors_have_the_shapes_of_torchvisions_files(depth, shapes):
    state = meta(depth).state_dict()
    assert {k: tuple(state[k].shape) for k in shapes} == shapes


# ---------------------------------------------------------------------------------------------- oracle: a second forward pass
def forward_by_functions(state, x, depth, stem="imagenet", until="fc"):
    """The paper's network from its weights alone: no module of common/resnet.py takes part."""
    def conv(name, x, stride=1, padding=0):
        return F.conv2d(x, state[name + ".weight"], stride=stride, padding=padding)

    def norm(name, x):
        return F.batch_norm(x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), training=False, eps=1e-5)

    x = F.relu(norm("bn1", conv("conv1", x, 2, 3) if stem == "imagenet" else conv("conv1", x, 1, 1)))
    if stem == "imagenet":
        x = F.max_pool2d(x, 3, 2, 1)
    for stage, n in enumerate(BLOCKS[depth], 1):
        for i in range(n):
            name, stride, shortcut = f"layer{stage}.{i}.", 2 if stage > 1 and i == 0 else 1, x
            if name + "downsample.0.weight" in state:
                shortcut = norm(name + "downsample.1", conv(name + "downsample.0", x, stride))
            if depth == 18:
                x = F.relu(norm(name + "bn1", conv(name + "conv1", x, stride, 1)))
                x = norm(name + "bn2", conv(name + "conv2", x, 1, 1))
            else:
                x = F.relu(norm(name + "bn1", conv(name + "conv1", x)))
                x = F.relu(norm(name + "bn2", conv(name + "conv2", x, stride, 1)))
                x = norm(name + "bn3", conv(name + "conv3", x))
            x = F.relu(x + shortcut)
    return x if until == "features" else F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("stem, size", [("imagenet", 64), ("imagenet", 75), ("small", 28), ("small", 33)])
@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_the_forward_pass_equals_one_written_with_torchs_functions(depth, stem, size):
    net, x = worn(ResNet(depth, 3, 4, 8, stem)), torch.rand(2, 3, size, size + 5) * 2 - 1
    for until, got in (("features", net.features(x)), ("fc", net(x))):
        assert torch.allclose(got, forward_by_functions(net.state_dict(), x, depth, stem, until), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block, c_in, stride, shortcut", [
    (BasicBlock, 8, 1, False), (BasicBlock, 8, 2, True), (BasicBlock, 4, 1, True), (Bottleneck, 32, 1, False), (Bottleneck, 8, 1, True)])
def test_a_block_has_a_projection_only_where_its_shape_changes(block, c_in, stride, shortcut):
    made = block(c_in, 8, stride)
    assert (made.downsample is not None) == shortcut
    assert made(torch.randn(2, c_in, 6, 6)).shape == (2, 8 * block.expansion, 6 // stride, 6 // stride)


@pytest.mark.parametrize("stem, size, side", [("imagenet", 224, 7), ("imagenet", 200, 7), ("imagenet", 256, 8), ("imagenet", 448, 14),
                                              ("small", 28, 4), ("small", 32, 4), ("small", 64, 8)])
def test_the_map_has_a_cell_for_every_32_pixels_or_8_with_the_small_stem(stem, size, side):
    net = meta(18, 1, 0, 8, stem)
    assert net.features(torch.empty(1, 1, size, size, device="meta")).shape == (1, net.dim, side, side)
    assert not hasattr(net, "fc") and net.dim == 64


def test_gradients_reach_every_parameter():
    net = ResNet(50, 1, 3, 8, "small")
    net(torch.randn(4, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


# ---------------------------------------------------------------------------------------------- weights of others
@torch.no_grad()
def test_a_network_with_loaded_weights_has_the_features_of_the_one_they_came_from():
    source, net = worn(ResNet(18, 3, 10, 8)), ResNet(18, 3, 4, 8).eval()
    head = net.fc.weight.clone()
    load_backbone(net, source.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(net.features(x), source.features(x)) and torch.equal(net.fc.weight, head)


@torch.no_grad()
def test_gray_images_get_the_sum_of_the_kernels_for_red_green_and_blue():
    source, net = worn(ResNet(18, 3, 10, 8)), ResNet(18, 1, 0, 8).eval()
    load_backbone(net, source.state_dict())
    gray = torch.randn(2, 1, 64, 64)
    assert torch.allclose(net.features(gray), source.features(gray.expand(-1, 3, -1, -1)), atol=1e-4)


@torch.no_grad()
def test_names_with_the_module_prefix_of_data_parallel_are_understood():
    source, net = worn(ResNet(18, 3, 10, 8)), ResNet(18, 3, 0, 8).eval()
    load_backbone(net, {f"module.{k}": v for k, v in source.state_dict().items()})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net.features(x), source.features(x))


@torch.no_grad()
def test_old_files_without_num_batches_tracked_load():
    source, net = worn(ResNet(18, 3, 10, 8)), ResNet(18, 3, 0, 8).eval()
    load_backbone(net, {k: v for k, v in source.state_dict().items() if "num_batches" not in k})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net.features(x), source.features(x))


def test_loading_leaves_the_given_dict_as_it_was():
    weights = {k: v for k, v in ResNet(18, 3, 10, 8).state_dict().items() if "num_batches" not in k}
    before = {k: v.clone() for k, v in weights.items()}
    load_backbone(ResNet(18, 1, 0, 8), weights)
    assert weights.keys() == before.keys() and all(torch.equal(weights[k], before[k]) for k in before)


@pytest.mark.parametrize("given, wanted, words", [
    (dict(depth=50), dict(depth=18), "layer1.0.conv1.weight of shape (8, 8, 1, 1), the network needs (8, 8, 3, 3)"),
    (dict(depth=18), dict(depth=50), "layer1.0.conv1.weight of shape (8, 8, 3, 3), the network needs (8, 8, 1, 1)"),
    (dict(width=16), dict(), "conv1.weight of shape (16, 3, 7, 7), the network needs (8, 3, 7, 7)"),
    (dict(), dict(stem="small"), "conv1.weight of shape (8, 3, 7, 7), the network needs (8, 3, 3, 3)")])
def test_weights_of_another_depth_width_or_stem_are_refused_by_the_name_of_the_first_that_does_not_fit(given, wanted, words):
    net = ResNet(**dict(classes=0, width=8) | wanted)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_backbone(net, ResNet(**dict(classes=10, width=8) | given).state_dict())
    assert words in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())          # nothing was half loaded


def test_a_missing_tensor_is_named():
    weights = ResNet(18, 3, 10, 8).state_dict()
    del weights["layer3.1.bn2.running_var"]
    with pytest.raises(ValueError, match="no tensor layer3.1.bn2.running_var"):
        load_backbone(ResNet(18, 3, 0, 8), weights)


# ---------------------------------------------------------------------------------------------- input of pretrained weights
@torch.no_grad()
def test_pretrained_networks_see_images_by_the_imagenet_formula():
    plain, net = worn(ResNet(18, 3, 4, 8)), ResNet(18, 3, 4, 8, pretrained=True).eval()
    net.load_state_dict(plain.state_dict())                              # the constants are in no file
    u = torch.rand(2, 3, 64, 64)                                         # torchvision's input: 0..1, then Normalize(mean, std)
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    normalised = (u - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(net(u * 2 - 1), plain(normalised), atol=1e-4)


@torch.no_grad()
def test_pretrained_networks_for_gray_images_take_the_mean_of_the_constants():
    plain, net = worn(ResNet(18, 1, 4, 8)), ResNet(18, 1, 4, 8, pretrained=True).eval()
    net.load_state_dict(plain.state_dict())
    u = torch.rand(2, 1, 64, 64)
    assert torch.allclose(net(u * 2 - 1), plain((u - 0.449) / 0.226), atol=1e-4)


@torch.no_grad()
def test_networks_from_scratch_see_images_as_they_are():
    net = worn(ResNet(18, 3, 4, 8, pretrained=False))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(net(x), forward_by_functions(net.state_dict(), x, 18), atol=1e-4)
