"""Features and targets on one scale: mean 0, deviation 1 on the rows that a scaler is fitted on."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler


def standardized(fitted: np.ndarray, *parts: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Each number of a sample by itself; float64 (n, ...) -> the parts as (n, d), and the first deviation.

    fitted: the rows that give mean and deviation. A number that is the same in all of them becomes 0 there.
    """
    rows = [part.reshape(len(part), -1) for part in (fitted, *parts)]
    scaler = StandardScaler().fit(rows[0])
    return [scaler.transform(part) for part in rows[1:]], float(scaler.scale_[0])


def of_images(fitted: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of these images, uint8 (n, c, h, w) -> float32 (1, c, 1, 1) each."""
    images = [torch.from_numpy(part) for part in fitted]
    channels = images[0].shape[1]
    # Counts of each byte value in each channel: mean and deviation exact, without a float64 copy of the set.
    counts = sum(
        torch.stack([part[:, c].flatten().bincount(minlength=256) for c in range(channels)]) for part in images
    )
    share, value = counts.double() / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
    mean = share @ value
    deviation = (share @ value**2 - mean**2).sqrt()
    deviation[deviation == 0] = 1.0  # as StandardScaler does
    mean, deviation = (t.float().view(1, channels, 1, 1) for t in (mean, deviation))
    return mean, deviation
