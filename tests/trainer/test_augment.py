"""Changes of appearance: stains, immunohistochemistry, focus, JPEG, exposure and size."""

from dataclasses import replace

import numpy as np
import torch
from skimage.measure import label, regionprops
from torch.nn import functional as F

from cellseg_batch.trainer import augment
from cellseg_batch.trainer.augment import Augmenter
from cellseg_batch.trainer.augment.stains import REFERENCE, find_stains, separate, show, stain_immune
from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.data.sample import Annotation, Entry, Sample, make_sample
from cellseg_batch.trainer.recipe import Recipe

SIDE = 96


def tissue(stains, seed=0):
    """Amounts (3, H, W) of haematoxylin in blobs and eosin between them, and the picture of them."""
    generator = torch.Generator().manual_seed(seed)
    cloud = F.interpolate(torch.rand(1, 1, 12, 12, generator=generator), size=(SIDE, SIDE), mode="bicubic")[0, 0]
    nuclei = (cloud > 0.55).float()
    speckle = 1 + 0.2 * torch.rand(SIDE, SIDE, generator=generator)
    amounts = torch.stack([1.2 * nuclei * speckle, 0.6 * (1 - nuclei) * speckle, torch.zeros(SIDE, SIDE)])
    return amounts, show(amounts, stains)


def sample_of(image, labels):
    return Sample("a", "", image, (0.0, 1.0), labels, np.zeros(labels.shape, np.uint8))


def tissue_sample():
    amounts, pixels = tissue(REFERENCE)
    return sample_of(pixels.permute(1, 2, 0).contiguous().numpy(), (amounts[0] > 0).numpy().astype(np.int32))


def augmenter(seed=0, **changes):
    return Augmenter(Recipe("a", **{"size": 64, **changes}), np.random.default_rng(seed))


def test_amounts_of_stain_come_back_out_of_their_picture():
    amounts, pixels = tissue(REFERENCE)
    torch.testing.assert_close(separate(pixels, REFERENCE), amounts, atol=1e-3, rtol=0)
    assert (show(torch.zeros(3, 4, 4), REFERENCE) == 1).all(), "no stain is white"


def test_a_pictures_own_stains_are_found_whichever_laboratory_made_it():
    other = F.normalize(torch.tensor([[0.55, 0.75, 0.36], [0.20, 0.93, 0.30], [0.3, 0.1, 0.9]]))
    for stains in (REFERENCE, other):
        found = find_stains(tissue(stains)[1])
        cosines = (found[:2] * stains[:2]).sum(dim=1)
        assert (cosines > 0.995).all()
        torch.testing.assert_close(found[2] @ found[:2].T, torch.zeros(2), atol=1e-5, rtol=0)


def test_pictures_without_two_stains_get_the_references():
    one = show(torch.rand(3, SIDE, SIDE) * torch.tensor([1.0, 0, 0]).view(3, 1, 1), REFERENCE)
    for pixels in (torch.ones(3, SIDE, SIDE), one, torch.full((3, SIDE, SIDE), 0.5)):
        assert torch.equal(find_stains(pixels), REFERENCE)


def test_restaining_changes_colours_and_leaves_shapes():
    amounts, pixels = tissue(REFERENCE)
    changed = torch.stack([augmenter(seed)._restain(pixels) for seed in range(12)])
    assert torch.isfinite(changed).all()
    hues = changed.mean(dim=(2, 3))
    assert (hues.std(dim=0) > 0.02).all()
    nuclei, darkness = amounts[0] > 0, 1 - changed[:, 0]
    apart = darkness[:, nuclei].mean(dim=1) - darkness[:, ~nuclei].mean(dim=1)
    assert (apart > 0.05).sum() >= 11, "nuclei still take more of the red than what is around them"


def test_immunohistochemistry_has_brown_and_blue_nuclei_on_pale_ground():
    amounts, pixels = tissue(REFERENCE)
    nuclei = amounts[0] > 0
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    red, _, blue = stain_immune(pixels, left, brown=1.5, cytoplasm=0, blue=0.8)
    brown_ones, blue_ones = nuclei & (left > 0), nuclei & (left == 0)
    assert red[brown_ones].mean() > blue[brown_ones].mean() + 0.1
    assert blue[blue_ones].mean() > red[blue_ones].mean() + 0.1
    assert red[~nuclei].mean() > 0.9
    brown_ground = stain_immune(pixels, left, brown=1.5, cytoplasm=1, blue=0.8)
    assert brown_ground[2][~nuclei].mean() < blue[~nuclei].mean() - 0.1


def test_the_share_of_brown_nuclei_differs_between_pictures():
    labels = torch.arange(1, 65).view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    pixels = show(torch.ones(3, 64, 64) * torch.tensor([1.0, 0, 0]).view(3, 1, 1), REFERENCE)
    shares = []
    for seed in range(12):
        red, _, blue = augmenter(seed)._immune(pixels, labels)
        shares.append(float((red > blue).float().mean()))
    assert min(shares) < 0.3
    assert max(shares) > 0.7


def test_jpeg_leaves_artefacts_that_begin_anywhere():
    _, pixels = tissue(REFERENCE)
    stored = [augmenter(seed)._jpeg(pixels) for seed in range(8)]
    for one in stored:
        assert one.shape == pixels.shape
        assert 0.001 < (one - pixels).abs().mean() < 0.1
    assert len({float((one - pixels).abs().mean()) for one in stored}) == 8


def test_a_picture_out_of_focus_keeps_its_mean():
    _, pixels = tissue(REFERENCE)
    blurred = augmenter(1)._blur(pixels)
    assert blurred.dtype == torch.float32
    torch.testing.assert_close(blurred.mean(dim=(1, 2)), pixels.mean(dim=(1, 2)), atol=0.01, rtol=0)
    assert blurred.diff(dim=2).abs().mean() < 0.8 * pixels.diff(dim=2).abs().mean()


def test_only_chosen_samples_are_changed():
    pixels = torch.rand(3, 3, 4, 4)
    changed = Augmenter._each(torch.tensor([False, True, False]), lambda one, add: one + add, pixels, torch.ones(3))
    assert torch.equal(changed[0], pixels[0])
    assert torch.equal(changed[1], pixels[1] + 1)
    assert torch.equal(changed[2], pixels[2])


def test_plain_pictures_keep_their_appearance():
    sample = tissue_sample()
    batch = augmenter(2, plain=0.5).batch([sample] * 16)
    colours = {tuple(one) for one in (sample.image * 255).round().astype(int).reshape(-1, 3)}
    kept = [
        {tuple(p) for p in (255 * one.permute(1, 2, 0).numpy()).round().astype(int).reshape(-1, 3)} <= colours
        for one in batch.pixels
    ]
    assert 3 < sum(kept) < 13
    assert torch.isfinite(batch.pixels).all()
    assert batch.pixels.min() >= 0
    assert batch.pixels.max() <= 1


def test_tissue_and_fluorescence_are_functions_of_the_generator():
    sample = tissue_sample()
    grey = replace(sample, image=np.ascontiguousarray(1 - sample.image[..., :1]))
    first, second = (augmenter(9).batch([sample, grey] * 8) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.labels, second.labels)


def test_a_shrunk_picture_shows_no_detail_finer_than_its_pixels(monkeypatch):
    noise = np.random.default_rng(0).random((200, 200, 1), np.float32)
    sample = sample_of(noise, np.ones((200, 200), np.int32))

    def spread():
        shown = [augmenter(seed, zoom_min=0.5, zoom_max=0.5)._picture(sample, False)[0].std() for seed in range(8)]
        return float(torch.stack(shown).mean())

    fine = spread()
    monkeypatch.setattr(augment, "_COARSE", 0.0)
    assert fine < 0.75 * spread()


def test_shrunk_pictures_show_labels_where_their_pixels_are():
    ids = np.repeat(np.arange(1, 201, dtype=np.int32)[None], 200, axis=0)
    sample = sample_of((ids / np.float32(200))[..., None], ids)
    offsets = []
    for seed in range(40):
        pixels, labels, *_ = augmenter(seed, zoom_min=0.5, zoom_max=0.5)._picture(sample, False)
        inside = (labels > 20) & (labels < 180)
        offsets.append((pixels[0] * 200 - labels)[inside].mean())
    assert abs(float(torch.stack(offsets).mean())) < 0.1


def test_pictures_are_shrunk_until_their_objects_are_8_px_wide_and_no_further():
    y, x = np.mgrid[:320, :320]
    for diameter in (10, 32):
        disks = np.hypot(y % 40 - 20, x % 40 - 20) < diameter / 2
        annotation = Annotation(disks[..., None].astype(np.uint8), disks * (1 + y // 40 * 8 + x // 40))
        sample = make_sample(Entry("a", "", "", lambda annotation=annotation: annotation), Normalisation())
        widths = []
        for seed in range(40):
            _, labels, *_ = augmenter(seed, size=128, zoom_min=0.1, zoom_max=1.0)._picture(sample, False)
            largest = max(region.area for region in regionprops(label(labels.numpy())))  # the others may be cut
            widths.append(2 * np.sqrt(largest / np.pi))
        assert 7 < min(widths) < 9, widths
