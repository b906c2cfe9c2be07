"""DiffMIC, MedSymmFlow, the diffusion classifier and Mediffusion as their authors arrange them, over the weights of our networks. For comparison only.

Slow, with their quirks; written from the fact sheets, papers/diffmic.md, symmflow.md, diffclassifier.md and mediffusion.md, whose items the docstrings
name; nobody's source was read or copied. tests/test_authors.py shows where the two arrangements agree to rounding, and where they must not.
What they do once and for no result (a copy of all crops, 4.2.6) is left out, and positions reach the CPU once a forward: times err in
their favour. DiffMIC's train in float32: no autocast in here. B images, K regions of size s, C classes, n reverse steps, ab = alpha_bar.
"""
import torch
import torch.nn.functional as F

import diffclassifier
import diffmic
from common.mmd import mmd_rbf
from common.schedules import ddpm_step, level, linear_alpha_bar


# ============================================================================= the guide
def heat_map(saliency):
    """2.1: class maps (B, C, h, w), min-max normalised and summed over the classes -> (B, 1, h, w).

    4.1.8: a class whose map is constant is 0 / 0, and the sum NaN.
    """
    flat = saliency.flatten(2)
    low, high = flat.min(2).values[..., None, None], flat.max(2).values[..., None, None]
    return ((saliency - low) / (high - low)).sum(1, keepdim=True)


def find_rois(saliency, image_size, size, count):
    """2.1: `count` times the best window of the heat map, which is then set to 0 -> upper left corners (B, K, 2) in pixels, numpy.

    A corner is that of the window's first cell. 4.1.8: cells at 0 can be found again, and NaN stays: all corners are (0, 0).
    """
    heat, (h, w), (H, W) = heat_map(saliency), saliency.shape[2:], image_size
    kh, kw = max(1, round(size * h / H)), max(1, round(size * w / W))
    r, c = torch.meshgrid(torch.arange(h, device=heat.device), torch.arange(w, device=heat.device), indexing="ij")
    cells = []
    for _ in range(count):
        score = F.avg_pool2d(heat, (kh, kw), 1)
        best = score.flatten(1).argmax(1).view(-1, 1, 1, 1)
        row, column = best // score.shape[3], best % score.shape[3]
        heat = heat * ~((row <= r) & (r < row + kh) & (column <= c) & (c < column + kw))
        cells.append(torch.cat([row, column], 1).flatten(1))
    cells = torch.stack(cells, 1).cpu().numpy()                         # 4.2.6: the GPU waits here
    return (cells / [h, w] * [H, W]).round().astype(int)


def crop(x, corners, size, red):
    """2.1, 4.2.6: crops (B, K, channels, s, s), one at a time; red: channel 0 in the place of all (4.1.7).

    What lies beyond the border is the image's minimum, which is looked for K times. It is needed only where s exceeds a window.
    """
    crops = []
    for i in range(len(x)):
        for row, column in corners[i]:
            image = x[i, :1] if red else x[i]
            piece = image[:, row:row + size, column:column + size]
            patch = image.min().expand(len(image), size, size).clone()
            patch[:, :piece.shape[1], :piece.shape[2]] = piece
            crops.append(patch.expand(x.shape[1], -1, -1))
    return torch.stack(crops).unflatten(0, corners.shape[:2])


def guide(dcg, x, red=True):
    """2.1: the guide of images x (B, channels, H, W) -> diffmic.Guide; y_g by a full sort (4.2.7), crops in red alone (4.1.7)."""
    saliency = dcg.to_saliency(dcg.global_net.features(x)).float()
    cells = saliency.flatten(2)
    y_g = cells.topk(cells.shape[2]).values.mean(2)                     # the mean of the largest 100 %
    corners = find_rois(saliency.detach(), x.shape[2:], dcg.roi_size, dcg.rois)
    crops = crop(x, corners, dcg.roi_size, red)
    h = dcg.local_net.features(crops.flatten(0, 1)).mean((2, 3)).unflatten(0, crops.shape[:2])
    attention = dcg.attention_w(dcg.attention_v(h).tanh() * dcg.attention_u(h).sigmoid()).softmax(1)
    y_l = dcg.to_local((attention * h).sum(1))
    return diffmic.Guide(y_g, y_l, saliency, torch.from_numpy(corners).to(x.device), attention[..., 0])


# ============================================================================= the diffusion
def denoise(nets, x, y, y_g, y_l, f, t):
    """2.2: eps_hat (B, C), with rho(x) computed inside, at every call."""
    return nets.denoiser(y, y_g, y_l, f, nets.encoder(x), t).float()


def train_step(nets, config, x, y, red=True):
    """2.4: forward and backward passes of one iteration for images x and labels y (B,) -> dict of losses; no optimizer.

    4.2.2: the encoder runs three times. 4.2.3: priors in evaluation mode, not detached, so the diffusion loss goes back through
    the guide, whose gradients are then zeroed; a second forward, in training mode, is for its cross-entropy.
    """
    assert config.target == "eps" and config.roi_weight == "uniform", "theirs is recipe paper"
    nets.train()
    nets.guide.eval()
    y_g, y_l = guide(nets.guide, x, red).priors()
    y0 = F.one_hot(y, nets.classes).float()
    t = diffmic.draw_timesteps(len(x), config.timesteps, config.antithetic, x.device)
    eps, a, s = torch.randn_like(y0), nets.sqrt_ab[t, None], nets.sqrt_1m_ab[t, None]

    def branch(y_g, y_l, f):
        return denoise(nets, x, diffmic.q_sample(y0, f, eps, a, s), y_g, y_l, f, t)

    losses = {"eps": ((eps - branch(y_g, y_l, diffmic.prior_mean(y_g, y_l, config.prior_mean))) ** 2).mean()}
    for name, prior in (("mmd_g", y_g), ("mmd_l", y_l)):
        losses[name] = mmd_rbf(eps, branch(prior, prior, prior), bandwidth=nets.classes)
    losses["diffusion"] = losses["eps"] + config.mmd_weight * (losses["mmd_g"] + losses["mmd_l"])
    losses["diffusion"].backward()

    nets.guide.train()
    nets.guide.zero_grad()
    again = guide(nets.guide, x, red)
    losses["guide"] = F.cross_entropy((again.logits_g + again.logits_l) / 2, y)
    losses["guide"].backward()
    return {name: value.detach() for name, value in losses.items()}


def truncated_timesteps(T, n):
    """2.3, 4.1.1: the first n of T levels, n-1 .. 0, although the chain starts from pure noise."""
    assert 1 <= n <= T, f"{n} steps: must lie in 1..{T}"
    return torch.arange(n - 1, -1, -1)


def predict(nets, config, x, noise, timesteps=None, red=True):
    """2.3: one draw y_0 (B, C) for images x and noise (B, n, C), over `timesteps`, n falling levels; none: the first n = steps.

    4.2.1: the encoder runs at every step. 4.2.4: the guide runs twice, once for its own accuracy and once for the priors.
    """
    assert config.target == "eps" and config.roi_weight == "uniform", "theirs is recipe paper"
    timesteps = truncated_timesteps(config.timesteps, config.steps) if timesteps is None else timesteps
    alpha_bar = linear_alpha_bar(config.timesteps)
    guide(nets.guide, x, red)
    y_g, y_l = guide(nets.guide, x, red).priors()
    f = diffmic.prior_mean(y_g, y_l, config.prior_mean)
    y = f + noise[:, 0]
    levels = [int(t) for t in timesteps] + [-1]
    for i, (t, s) in enumerate(zip(levels, levels[1:])):
        ab_t, ab_s = level(alpha_bar, t), level(alpha_bar, s)
        eps = denoise(nets, x, y, y_g, y_l, f, torch.full((len(y),), t, device=y.device))
        y0 = (y - (1 - ab_t ** .5) * f - (1 - ab_t) ** .5 * eps) / ab_t ** .5
        y = ddpm_step(y, y0, noise[:, i + 1] if s >= 0 else 0., ab_t, ab_s, f)
    return y


# ============================================================================= MedSymmFlow: the U-Net, guided-diffusion's way
def norm32(norm, x):
    """symmflow.md 2.1: GroupNorm in float32, and back."""
    return F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def attend(attention, x):
    """2.1: q and k times d^(-1/4) each, the matrix of all pairs by einsum, its softmax in float32. They compute it a second time
    in the backward pass (5.8, checkpointing), which is left out."""
    B, C, H, W = x.shape
    d, tokens = C // attention.heads, x.flatten(2)
    qkv = F.conv1d(norm32(attention.norm, tokens), attention.qkv.weight[..., None], attention.qkv.bias)
    q, k, v = (part.reshape(B * attention.heads, d, H * W) for part in qkv.chunk(3, 1))
    weights = torch.einsum("bct,bcs->bts", q * d ** -.25, k * d ** -.25)
    weights = weights.float().softmax(-1).to(weights.dtype)
    h = torch.einsum("bts,bcs->bct", weights, v).reshape(B, C, -1)
    return (tokens + F.conv1d(h, attention.projection.weight[..., None], attention.projection.bias)).view(B, C, H, W)


def unet_block(block, x, emb):
    res = block.res
    h = res.conv1(F.silu(norm32(res.norm1, x))) + res.embedding(F.silu(emb))[:, :, None, None]
    h = res.skip(x) + res.conv2(res.dropout(F.silu(norm32(res.norm2, h))))
    return attend(block.attention, h) if hasattr(block.attention, "qkv") else h


def unet(net, x, t):
    """2.1: the forward pass of a common.unet.UNet without classes."""
    emb, skips, h = net.embed(t), [], x
    for conv, blocks in zip(net.enter, net.down):
        h = conv(h)
        skips.append(h)
        for block in blocks:
            h = unet_block(block, h, emb)
            skips.append(h)
    for block in net.middle:
        h = unet_block(block, h, emb)
    for blocks, leave in zip(net.up, net.leave):
        for block in blocks:
            h = unet_block(block, torch.cat([h, skips.pop()], 1), emb)
        last = leave[-1]
        h = last(F.interpolate(h, scale_factor=2, mode="nearest")) if len(leave) == 2 else last(F.silu(norm32(leave[0], h)))
    return h


# ============================================================================= diffusion classifier
def reconstruction_errors(nets, config, x, t, eps):
    """diffclassifier.md 1.2: errors (N, K) of one image x (1, C, H, W) at times t (N,) with noise eps (N, C, H, W): a loop over steps and
    classes, one image in the network at a time. Their network predicts v."""
    found = torch.empty(len(t), nets.classes)
    for n, time in enumerate(t):
        l = diffclassifier.logsnr(config, time[None], x.shape[-1])
        a, s = (torch.sigmoid(sign * l).sqrt().view(1, 1, 1, 1) for sign in (1, -1))
        z = a * x + s * eps[n]
        for k in range(nets.classes):
            v = nets.denoise(z, l, torch.tensor([k], device=x.device)).float()
            found[n, k] = (s * z + a * v - eps[n]).square().sum()
    return found


# ============================================================================= MedSymmFlow's latent variant
SCALE = 0.18215


def encode_latents(codec, codes, noise_width, x, labels):
    """1.5: what flows, of a training batch: image and RGB label map are both encoded, at every step anew (5.10). Here the mean of
    the image's posterior, of which they draw a sample."""
    maps = codes[labels][:, :, None, None].expand(-1, -1, *x.shape[2:])
    maps = maps + noise_width * (2 * torch.rand_like(maps) - 1)
    return codec.encode(x.expand(-1, 3, -1, -1))[0] * SCALE, codec.encode(maps)[0] * SCALE


def classify_latents(codec, net, codes, x, noise):
    """1.3, 1.5: images x (B, channels, H, W) and noise (B, 4, H/8, W/8) -> distances (B, K) after one step.

    5.1: the image at t = 0, which nobody looks at, is decoded like the label map.
    """
    x = codec.encode(x.expand(-1, 3, -1, -1))[0] * SCALE
    v = unet(net, torch.cat([x, noise], 1), x.new_ones(len(x)))
    x, y = (z / SCALE for z in (x - v[:, :x.shape[1]], noise - v[:, x.shape[1]:]))
    y, _ = codec.decode(y), codec.decode(x)
    return (y[:, None] - codes[:, :, None, None]).norm(dim=2).mean((2, 3))


# ============================================================================= Mediffusion
def remove(nets, x, noise, label, scale):
    """mediffusion.md 0 and 1: images x (B, channels, H, W) without a label, by ancestral steps from level T - 1, with noise (T + 1, B, C, h, w), the last of
    it to begin with. Each step differentiates the classifier's answer to the guess of z_0, which has the embedding of t, through both of the U-Net's
    passes. The second is here the encoder's alone, the mean of the posterior takes the place of a sample, and levels are not off by one."""
    alpha_bar, T = nets.alpha_bar.double().tolist(), len(noise) - 1
    z = nets.latents(x)
    z = alpha_bar[T - 1] ** .5 * z + (1 - alpha_bar[T - 1]) ** .5 * noise[T]
    for t in reversed(range(T)):
        ab_t, ab_s, at = alpha_bar[t], alpha_bar[t - 1] if t else 1., torch.full((len(x),), t, device=x.device)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            eps = nets.unet(z, at).float()
            answer = nets.head(nets.pooled((z - (1 - ab_t) ** .5 * eps) / ab_t ** .5, at))[:, label]
            (gradient,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(answer, torch.zeros_like(answer), reduction="sum"), z)
        eps = eps.detach() + scale * (1 - ab_t) ** .5 * gradient
        z = ddpm_step(z.detach(), (z.detach() - (1 - ab_t) ** .5 * eps) / ab_t ** .5, noise[t] if t else 0., ab_t, ab_s)
    return nets.decoded(z).clamp(-1, 1)
