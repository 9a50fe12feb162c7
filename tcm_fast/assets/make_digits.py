"""Makes digits.npz, the built-in set, from scikit-learn's copy of the UCI handwritten digits.

    python tcm_fast/assets/make_digits.py

Run it only to reproduce the file: it needs scikit-learn, which the library itself does not.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    """Write images uint8 [1797,8,8] (0..16 spread over 0..255) and labels uint8 [1797]."""
    digits = load_digits()
    np.savez_compressed(
        Path(__file__).with_name("digits.npz"),
        images=np.rint(digits.images * (255 / 16)).astype(np.uint8),
        labels=digits.target.astype(np.uint8),
    )


if __name__ == "__main__":
    main()
