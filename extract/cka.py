"""Linear centred kernel alignment (CKA): similarity of two layers over the same frames.

Source: Kornblith et al. 2019 (arXiv:1905.00414), section 3. Shapes: S and L layers of two models, N frames, D and E
features.
"""

import numpy as np
from numpy.typing import NDArray


def linear_cka(
    cross_SL: NDArray[np.float64], own_S: NDArray[np.float64], own_L: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return linear CKA of every pair of layers, float64 (S, L): ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F).

    cross_SL: ||Y'X||_F^2 of every pair; own_S, own_L: ||X'X||_F^2 of every layer. X (N, D) and Y (N, E) are centred
    over the frames. A factor that all frames share cancels, so covariances may replace the products. The result is nan
    for a layer that is constant over the frames.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        cka_SL: NDArray[np.float64] = cross_SL / np.outer(np.sqrt(own_S), np.sqrt(own_L))
    return cka_SL
