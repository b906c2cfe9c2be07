"""What drawn images are worth: are they copies of training images, how far are they from real ones, do they show what was asked for?"""
import numpy as np
import torch

from . import metrics, plots
from .mmd import mmd_polynomial


def some_rows(split, n, seed):
    """n rows of a split, or all, drawn from the whole of it: in a folder's order the first n would be of one class."""
    return np.sort(np.random.default_rng(seed).permutation(len(split))[:n])


def nearest(images, among, device, chunk=1000):
    """Of each image uint8 (N, ...): root mean square distance in grey levels to the closest of `among`, and which it is, both (N,)."""
    x, best = torch.from_numpy(np.array(images)).to(device).flatten(1).float(), None
    for i in range(0, len(among), chunk):
        y = torch.from_numpy(np.array(among[i:i + chunk])).to(device).flatten(1).float()
        # no matrix product: it would put an exact copy at a distance above 0
        value, where = (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** .5).min(1)
        best = (value, where) if best is None else (torch.minimum(best[0], value), torch.where(value < best[0], where + i, best[1]))
    return best[0].cpu().numpy(), best[1].cpu().numpy()


@torch.no_grad()
def judge(resnet, images, device):
    """The plain ResNet's labels (N,) and pooled features (N, dim) float64 of images uint8."""
    features = torch.cat([resnet.features(x.to(device).float() / 127.5 - 1).float().mean((2, 3)) for x in torch.from_numpy(np.array(images)).split(128)])
    return resnet.fc(features).argmax(1).cpu().numpy(), features.cpu().double().numpy()


def measure(images, rows, data, resnet, device, figures, seed, title):
    """Figures drawn.png and nearest.png, and a dict of numbers, of images uint8 (n, C, H, W) drawn with the labels of validation's `rows`.

    distance_to_training       median distance to the nearest training image; distance_of_validation: the same of real images
    label_agreement            share to which the plain ResNet, which shares no weight with what drew, gives the label asked for
    frechet_..., kernel_...    distances in that ResNet's features between drawn, or as many training images, and validation. No FID: the
                               features are this data set's own.
    """
    labels, real, some = data.val.labels[rows], data.val.images[rows], data.train.images[some_rows(data.train, len(rows), seed)]
    (near, where), (near_real, _) = (nearest(x, data.train.images, device) for x in (images, real))
    of_class = {name: images[labels == k][:8] for k, name in enumerate(data.classes) if (labels == k).any()}
    plots.image_grid(figures / "drawn.png", list(of_class.values()), row_names=list(of_class), title=title)
    closest = near.argsort()[:8]
    plots.image_grid(figures / "nearest.png", [images[closest], data.train.images[where[closest]]], row_names=["drawn", "nearest in training"],
                     title="The drawn images that are closest to a training image")
    found = {"images": len(rows), "distance_to_training": float(np.median(near)), "distance_of_validation": float(np.median(near_real))}
    if resnet is not None:
        (seen, x), (seen_real, y), (_, z) = (judge(resnet, part, device) for part in (images, real, some))
        found |= {"label_agreement": metrics.accuracy(labels, seen), "label_agreement_of_validation": metrics.accuracy(labels, seen_real)}
        for name, features in (("drawn", x), ("training", z)):
            found[f"frechet_{name}_to_validation"] = metrics.frechet_distance(features, y)
            found[f"kernel_{name}_to_validation"] = float(mmd_polynomial(torch.from_numpy(features), torch.from_numpy(y)))
    return found
